"""Run megatron-core on a machine without CUDA.

megatron-core asks torch.cuda for its device, its streams and its generator, and names dtypes 'torch.cuda.FloatTensor'.
`without_cuda` answers those questions for the length of a `with` block and restores torch afterwards, so that nothing
else in the process (an inline rollout engine, a reward model) ever sees the substitutes. No-op for a CUDA device.
"""
from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.utils._device

# Of no use to whoever runs a trainer: "Apex is not installed" (it is not needed) and deprecations of what megatron-core calls.
warnings.filterwarnings("ignore", module=r"megatron\.core")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

import megatron.core.tensor_parallel.random as megatron_random  # noqa: E402

CPU = torch.device("cpu")
FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "as_tensor", "arange", "empty_like", "zeros_like", "ones_like", "full_like")
_generator = torch.Generator(device="cpu").manual_seed(0)
_depth = 0


class _Stream:
    """Stands for the current CUDA stream: every method does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextmanager
def without_cuda(device: torch.device) -> Iterator[None]:
    """Within the block megatron-core takes `device`, a CPU, for its accelerator. Reentrant; no-op where it is a GPU."""
    global _depth
    if device.type == "cuda" or _depth:
        yield
        return
    torch.utils._device._device_constructors()  # caches the original factories; must not see the wrapped ones
    patches = _patches()
    _depth += 1
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()
        _depth -= 1


def _patches() -> list[Any]:
    cuda: dict[str, Any] = {
        "is_available": lambda: False,
        "current_device": lambda: CPU,
        "synchronize": lambda *args, **kwargs: None,
        "current_stream": lambda *args, **kwargs: _Stream(),
        "get_rng_state": lambda device=None: _generator.get_state(),
        "manual_seed": lambda seed: _generator.manual_seed(int(seed)) and None,
    }
    return [
        *(mock.patch.object(torch, name, _on_cpu(getattr(torch, name))) for name in FACTORIES),
        *(mock.patch.object(torch.cuda, name, substitute) for name, substitute in cuda.items()),
        mock.patch.object(torch.cuda.random, "get_rng_state", cuda["get_rng_state"]),
        mock.patch.object(torch.Tensor, "cuda", lambda self, *args, **kwargs: self),
        mock.patch.object(torch.Tensor, "type", _cuda_type(torch.Tensor.type)),
        mock.patch.object(megatron_random, "_set_cuda_rng_state", lambda state, device=-1, graph_safe=False: _generator.set_state(state)),
    ]


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same factory with device="cuda" read as the CPU."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if (wish := kwargs.get("device")) is not None and torch.device(wish).type == "cuda":
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return make


def _cuda_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """`tensor.type()` in the names that megatron-core's optimizer compares with."""

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        named = original(self, *args, **kwargs)
        return named.replace("torch.", "torch.cuda.", 1) if isinstance(named, str) else named

    return type_
