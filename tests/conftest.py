"""Before anything that imports torchvision: the hook that lets its CUDA wheel import beside CPU torch."""
import sophiavl_fast  # noqa: F401
