"""Put this folder on a child's PYTHONPATH: the torchvision hook, and an end with its parent, for it and for the processes that it starts in turn."""
from sophiavl_fast.compat import orphans, torchvision_cpu

orphans.follow_parents()
torchvision_cpu.install()
