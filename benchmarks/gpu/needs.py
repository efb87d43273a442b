"""Packages beside torch, triton and transformers: which parts want them, and how they come to a machine that can download nothing."""
from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from benchmarks.gpu import process

PINS = Path(__file__).resolve().parents[1] / "requirements-gpu-suite.txt"
MEGATRON, PYDANTIC, LIGER = "megatron.core", "pydantic", "liger_kernel.transformers.functional"
TRL, VERL = "trl.kernels", "verl.utils.kernel.linear_cross_entropy"
OPTIONAL = (TRL, VERL)                          # peers: absent is a finding, no failure


def absent(parts: dict[str, Iterable[str]]) -> dict[str, str]:
    """module -> why it cannot be imported and what that costs, for {part: modules it wants}; every module is really imported."""
    found = {}
    for module in dict.fromkeys(module for wanted in parts.values() for module in wanted):
        try:
            load(module)
        except Exception as error:  # a wheel for another Python or torch fails with anything
            who = ", ".join(name for name, wanted in parts.items() if module in wanted)
            first = (str(error).splitlines() or [""])[0]
            found[module] = f"{type(error).__name__}: {first}; {'left out of' if module in OPTIONAL else 'will fail:'} {who}"
    return found


def load(module: str) -> ModuleType:
    """Import it. verl's own `__init__` files want ray and more for kernels that need neither: they are passed over."""
    top = module.split(".")[0]
    if top == "verl" and top not in sys.modules:
        for package in ("verl", "verl.utils"):
            spec = importlib.util.find_spec(package)
            if spec is None or spec.submodule_search_locations is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
            sys.modules[package] = importlib.util.module_from_spec(spec)  # made, never run
    return importlib.import_module(module)


def install(wheels: Path) -> Path:
    """Unpack the wheels of a folder with pip, without a network, into a fresh folder for PYTHONPATH. Raises ValueError with pip's last line."""
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        raise ValueError(f"{wheels}: expected a folder of .whl files, see {PINS.name}")
    site = Path(tempfile.mkdtemp(prefix="gpu_suite_"))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(site), *files]
    code, output = process.run(command, seconds=120, capture=True)
    if code != 0:
        raise ValueError(f"{wheels}: {(output.strip().splitlines() or ['pip did not end within 120 s'])[-1]}")
    return site
