"""Second derivatives are refused with Triton's interpreted kernels behind the registered ops too; the rest of that page is above the backends."""
from tests.kernels.test_derivatives import test_second_derivatives_are_refused  # noqa: F401
