"""Argument checks shared by the ops: each failure is a ValueError that names the argument, its value and what was expected."""
from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def expect(holds: bool, name: str, value: object, expected: str) -> None:
    """Raise ValueError unless `holds`."""
    if not holds:
        raise ValueError(f"{name} = {value}: expected {expected}")


def expect_tensor(name: str, tensor: Tensor, shape: Sequence[int | str], dtypes: Sequence[torch.dtype], device: torch.device | None = None, *,
                  differentiable: bool = False) -> None:
    """Check kind, dtype, shape and device (None: any); a letter in `shape` stands for any size.

    Refused as well, since nobody would notice: tensors that require a gradient where the op gives none (unless `differentiable`),
    tangents of forward-mode differentiation, and tensors under torch.vmap.
    """
    if not isinstance(tensor, Tensor):
        expect(False, name, type(tensor).__name__, "a tensor")
    if tensor.dtype not in dtypes:
        expect(False, name, tensor.dtype, " or ".join(dict.fromkeys(str(d) for d in dtypes)))
    if tensor.layout != torch.strided:
        expect(False, name, f"a tensor of layout {tensor.layout}", "a dense one")
    _expect_plain(name, tensor)
    if tensor.dim() != len(shape) or not all(isinstance(want, str) or want == have for want, have in zip(shape, tensor.shape)):
        expect(False, name, f"a tensor of shape {list(tensor.shape)}", f"shape [{', '.join(map(str, shape))}]")
    if device is not None and tensor.device != device:
        expect(False, name, f"a tensor on {tensor.device}", f"device {device}")
    if not differentiable and torch.is_grad_enabled() and tensor.requires_grad:
        expect(False, name, "a tensor that requires a gradient", f"{name}.detach(): this op has no gradient for it")


def expect_number(name: str, value: float | Tensor | None, device: torch.device | None = None, *, least: float = -math.inf, above: float = -math.inf,
                  most: float = sys.float_info.max, finite: bool = True, optional: bool = False, debug: bool = False) -> None:
    """Check a number and its range; with a `device`, 0-d tensors there pass too, and their value is looked at where `reads_contents`."""
    if value is None and optional:
        return
    if isinstance(value, Tensor) and device is not None:
        expect_tensor(name, value, (), FLOATS + INTEGERS, device)
        if not reads_contents(value, debug):
            return
        value = value.item()
    kind = "a float" + " or a 0-d tensor" * (device is not None) + ", or None" * optional
    if isinstance(value, bool) or not isinstance(value, float | int):
        expect(False, name, repr(value), kind)
    assert value is not None
    if not (value >= least and value > above and (value <= most or not finite)):
        span = f" of at least {least:g}" if least > -math.inf else f" above {above:g}" if above > -math.inf else ""
        span += f" and at most {most:g}" * (most < sys.float_info.max)
        expect(False, name, value, "None or " * optional + "a finite value" * finite + "a value" * (not finite) + span)


def expect_count(name: str, value: int, least: int) -> None:
    """Check a whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:  # repr of torch.compile's symbols only where it is needed
        expect(False, name, repr(value), f"a whole number of at least {least}")


def expect_flags(**flags: Any) -> None:
    """Check that switches are True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            expect(False, name, repr(value), "True or False")


def expect_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Check that a string option is one of its choices."""
    expect(isinstance(value, str) and value in choices, name, repr(value), " | ".join(choices))


def reads_contents(tensor: Tensor, debug: bool) -> bool:
    """Contents are read on the CPU, where it is free, and elsewhere only on demand: on a GPU it would cost a sync.

    Under torch.compile they are not read at all: a value on the host would break the graph.
    """
    return not torch.compiler.is_compiling() and (debug or tensor.device.type == "cpu")


def expect_boundaries(name: str, boundaries: Tensor, end: int) -> None:
    """Contents of a cumulative-length vector: starts at 0, never falls, ends at `end`."""
    expect(boundaries[0].item() == 0, f"{name}[0]", boundaries[0].item(), "0")
    expect(bool((boundaries.diff() >= 0).all()), name, boundaries.tolist(), "boundaries that never fall")
    expect(boundaries[-1].item() == end, f"{name}[-1]", boundaries[-1].item(), f"{end}, the number of rows")


def _expect_plain(name: str, tensor: Tensor) -> None:
    """No tensor with a forward-mode tangent and none of torch.func's transforms, at any depth."""
    while True:
        # A tangent made outside of a compiled function cannot be seen in it: there an open level is enough.
        if forward_ad.unpack_dual(tensor).tangent is not None or (torch.compiler.is_compiling() and forward_ad._current_level >= 0):
            expect(False, name, "a tensor with a tangent", "a plain one: forward-mode differentiation is not implemented")
        if torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return
        if torch._C._functorch.is_batchedtensor(tensor):
            expect(False, name, "a tensor under torch.vmap", "a plain one: vmap is not supported")
        if torch.is_grad_enabled() and tensor.requires_grad:
            expect(False, name, "a tensor under torch.func", "a plain one: gradients are torch.autograd's, once")
        tensor = torch._C._functorch.get_unwrapped(tensor)
