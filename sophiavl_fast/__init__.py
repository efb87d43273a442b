"""sophiavl-fast: RL for vision-language reasoning models, exact or loud, and fast by measurement."""
from sophiavl_fast.compat import torchvision_cpu

__version__ = "0.1.0"

torchvision_cpu.install()  # lazy: costs nothing until something imports torchvision
