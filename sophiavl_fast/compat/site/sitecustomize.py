"""Put this folder on a child's PYTHONPATH to give it the torchvision hook (vLLM starts processes of its own)."""
from sophiavl_fast.compat import torchvision_cpu

torchvision_cpu.install()
