"""The tests of tests/kernels/test_saturation.py once more, on Triton's interpreted kernels."""
from tests.kernels.test_saturation import *  # noqa: F403
