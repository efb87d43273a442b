"""Which implementation of an op runs.

`backend` is an explicit wish; "auto" asks the environment variable SOPHIAVL_KERNELS, and where that is unset too takes
triton on a GPU, the C++ kernel on a CPU, else the plain-PyTorch reference. A wish that cannot be met is an error.
"""
from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from . import reference_logprob, reference_loss, reference_trust

BACKENDS = ("triton", "cpu", "reference")
IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "linear_logprob": {"reference": reference_logprob.linear_logprob},
    "logits_logprob": {"reference": reference_logprob.logits_logprob},
    "grpo_loss": {"reference": reference_loss.grpo_loss},
    "trust_advantage": {"reference": reference_trust.trust_advantage},
}


def implementation(op: str, backend: str, device: torch.device) -> Callable[..., Any]:
    """The function that computes `op` on `device`. Raises ValueError where a named backend is unknown or absent."""
    wish, origin = backend, "backend"
    if wish == "auto" and (forced := os.environ.get("SOPHIAVL_KERNELS")):
        wish, origin = forced, "SOPHIAVL_KERNELS"
    available = IMPLEMENTATIONS[op]
    if wish == "auto":
        native = "triton" if device.type == "cuda" else "cpu"
        return available.get(native, available["reference"])
    if wish not in BACKENDS:
        raise ValueError(f"{origin} = {wish!r}: expected auto | {' | '.join(BACKENDS)}")
    if wish not in available:
        raise ValueError(f"{origin} = {wish!r}: {op} has no such backend in this build; available: {', '.join(available)}")
    return available[wish]
