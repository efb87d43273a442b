"""One Triton launch as data: what runs and what is compiled ahead of time are the same description.

A Triton backend builds `Launch`es and calls them. Its module's `shipped() -> list[Shipped]` builds the same launches on
`meta` tensors of typical sizes and names them, so that `benchmarks/aot.py` compiles, without a GPU, exactly what a GPU
would launch: registers, spills, shared memory and matrix instructions are read off that, never off a copy.
"""
from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .triton_interpreter import cure, interprets

TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A kernel with everything it is launched with.

    kernel     the @triton.jit function
    grid       programs in x (up to 2^31 - 1), y and z (65,535 each)
    arguments  every parameter of the kernel by name: tensors, tensor descriptors, numbers, constexprs, None
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)  # maxnreg and the like

    def __call__(self) -> None:
        """Run it on the device of its first tensor, on that device's current stream. An empty grid is nothing to do."""
        if 0 in self.grid:
            return
        if interprets(self.kernel):
            cure()
        first = next((a for a in self.arguments.values() if isinstance(a, Tensor)), None)
        with torch.cuda.device_of(first) if first is not None and first.is_cuda else nullcontext():
            self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages, **self.options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipped:
    """One specialisation that is launched, ready for ahead-of-time compilation.

    name        unique over all modules: "grpo_loss/tokens/ppo-token"
    kernel      the @triton.jit function
    signature   every parameter: "*bf16", "i32", "fp32", "tensordesc<bf16[128,64]>" or "constexpr"
    constexprs  value of every parameter whose type is "constexpr"; a number that is 1 and an absent tensor are such too
    divisible   parameters that Triton takes as multiples of 16: aligned pointers, and integers that are
    archs       compute capabilities this configuration is chosen for, 80 and 90
    occupancy   programs a multiprocessor that the configuration was chosen for; the AOT table fails below it
    product     output tile (rows, columns) of a matrix product, None: no product. From 128 x 128 on a spill is a failure,
                and sm_90 must show HGMMA, sm_80 HMMA
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    archs: tuple[int, ...] = (80, 90)
    occupancy: int = 1
    product: tuple[int, int] | None = None

    @classmethod
    def of(cls, name: str, launch: Launch, *, archs: tuple[int, ...] = (80, 90), occupancy: int = 1, product: tuple[int, int] | None = None) -> Shipped:
        """What Triton would compile for `launch`, whose tensors may be on `meta`; a tensor counts as aligned to 16 bytes."""
        signature, constexprs, divisible = {}, {}, []
        for parameter in launch.kernel.params:
            value = launch.arguments[parameter.name]
            fixed = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
            kind = "constexpr" if parameter.is_constexpr else _kind(value, specialise=not parameter.do_not_specialize)
            signature[parameter.name] = kind
            if kind == "constexpr":
                constexprs[parameter.name] = value
            elif kind.startswith("*") or (kind in ("i32", "i64") and value % 16 == 0 and not fixed):
                divisible.append(parameter.name)
        return cls(name=name, kernel=launch.kernel, signature=signature, constexprs=constexprs, divisible=tuple(divisible), num_warps=launch.num_warps,
                   num_stages=launch.num_stages, options=launch.options, archs=archs, occupancy=occupancy, product=product)


def _kind(value: Any, specialise: bool) -> str:
    """Triton's type of a run-time argument: integers that are 1 and absent tensors become constants."""
    if value is None or (specialise and isinstance(value, int) and not isinstance(value, bool) and value == 1):
        return "constexpr"
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2 ** 31) <= value < 2 ** 31 else "i64"
    if isinstance(value, float):
        return "fp32"
    if hasattr(value, "block_shape"):  # a host-side tensor descriptor
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
    raise TypeError(f"{type(value).__name__} is no argument of a kernel")
