"""Which implementation of an op runs.

`backend` is an explicit wish; "auto" asks the environment variable SOPHIAVL_KERNELS (of which cpu means the C++ kernel for the op
that has one, the reference for the others), and where that is unset too takes
triton on a GPU, the C++ kernel on a CPU that has it, else the plain-PyTorch reference. A wish that cannot be met is an
error that says why. Backends are modules, imported when first asked for: a machine without Triton or a compiler never
notices them. A module may define `unavailable(op, device, dtype) -> str | None`: why it cannot serve, None: it can.
"""
from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from .triton_interpreter import interprets

BACKENDS = ("triton", "cpu", "reference")
WISHES = ("auto", *BACKENDS)
MODULES: dict[str, dict[str, str]] = {
    "linear_logprob": {"triton": "triton_logprob", "cpu": "cpu_logprob", "reference": "reference_logprob"},
    "logits_logprob": {"triton": "triton_logprob", "reference": "reference_logprob"},
    "grpo_loss": {"reference": "reference_loss", "triton": "triton_loss"},
    "trust_advantage": {"reference": "reference_trust", "triton": "triton_trust"},
}


def resolve(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that computes `op` there. Raises ValueError where a named one is unknown, absent or cannot serve."""
    wish, origin = backend, "backend"
    if wish == "auto" and (forced := os.environ.get("SOPHIAVL_KERNELS")):
        wish, origin = forced, "SOPHIAVL_KERNELS"
        if wish == "cpu" and wish not in MODULES[op] and device.type == "cpu":
            return "reference"
    if wish == "auto":
        native = "triton" if device.type == "cuda" else "cpu"
        served = dtype != torch.float64 and native in MODULES[op] and not _lack(op, native, device, dtype)
        return native if served else "reference"
    if wish not in BACKENDS:
        raise ValueError(f"{origin} = {wish!r}: expected {' | '.join(WISHES)}")
    if wish not in MODULES[op]:
        raise ValueError(f"{origin} = {wish!r}: {op} has no such backend in this build; available: {', '.join(MODULES[op])}")
    if why := _lack(op, wish, device, dtype):
        raise ValueError(f"{origin} = {wish!r}: {why}")
    return wish


def load(op: str, backend: str) -> ModuleType:
    """The module of a backend that `resolve` named."""
    return import_module(f"{__package__}.{MODULES[op][backend]}")


def implementation(op: str, backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """The function named `op` of the backend's module."""
    return getattr(load(op, resolve(op, backend, device, dtype)), op)


def _interpreting() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1."""
    return interprets(import_module("triton.language.standard").sum)


def _lack(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend cannot serve, None: it can."""
    if backend == "triton":
        if find_spec("triton") is None:
            return "the package triton is not installed"
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"it needs a CUDA device (or TRITON_INTERPRET=1 to interpret it), the tensors are on {device}"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return f"it needs compute capability 8.0 or newer, {device} has {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
        if dtype == torch.float64:
            return "it computes in float32; float64 needs backend='reference'"
        if device.type != "cuda" and not _interpreting():
            return "TRITON_INTERPRET=1 came after Triton was imported, which reads it then and once; set it where Python starts"
    unavailable = getattr(load(op, backend), "unavailable", None)
    return unavailable(op, device, dtype) if unavailable else None
