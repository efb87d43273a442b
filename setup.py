"""Package layout: `kernels/ops` on disk is imported as `sophiavl_fast.kernels`.

The folder `kernels/` must never hold an `__init__.py`: transformers looks for a top-level package of that name and
would import ours in its place. That is why the Python package sits one level down and is mapped here; editable
installs need setuptools' default mode (neither `strict` nor `compat` follows the mapping).
"""
from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sophiavl_fast", "sophiavl_fast.*"]), "sophiavl_fast.kernels"],
    package_dir={"sophiavl_fast": "sophiavl_fast", "sophiavl_fast.kernels": "kernels/ops"},
)
