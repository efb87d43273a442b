"""The tests of tests/kernels/test_derivatives.py once more, on Triton's interpreted kernels."""
from tests.kernels.test_derivatives import *  # noqa: F403
