"""Coefficients: floats, or 0-d tensors on the device, so that a captured CUDA graph replays with new values.

A schema has no type for "a number or a tensor or nothing": each travels as a letter of `kinds` (n, t, -), an entry of `numbers`
and an optional tensor. A Triton kernel takes a number or an address, told apart by the bits of ON_DEVICE.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Coefficient = float | Tensor


def schema(names: Sequence[str]) -> str:
    """The part of an op's schema that `encode` fills."""
    return ", ".join(["str kinds", "float[] numbers", *(f"Tensor? {name}" for name in names)])


def encode(names: Sequence[str], given: Mapping[str, Any]) -> tuple[str, list[float], *tuple[Tensor | None, ...]]:
    """(kinds, numbers, *tensors) of the named entries of `given`."""
    values = [given[name] for name in names]
    kinds = "".join("-" if v is None else "t" if isinstance(v, Tensor) else "n" for v in values)
    return kinds, [0.0 if v is None or isinstance(v, Tensor) else float(v) for v in values], *(v if isinstance(v, Tensor) else None for v in values)


def decode(names: Sequence[str], kinds: str, numbers: Sequence[float], tensors: Sequence[Tensor | None]) -> dict[str, Coefficient | None]:
    """What was encoded, by name."""
    return {name: {"-": None, "n": n, "t": t}[kind] for name, kind, n, t in zip(names, kinds, numbers, tensors, strict=True)}


def launched(names: Sequence[str], given: Mapping[str, Any]) -> tuple[dict[str, Coefficient | None], int]:
    """(arguments of a Triton kernel, ON_DEVICE: bit i set where coefficient i is an address)."""
    values = {name: given[name] if given[name] is None or isinstance(given[name], Tensor) else float(given[name]) for name in names}
    return values, sum(1 << i for i, name in enumerate(names) if isinstance(values[name], Tensor))


def doubled(*values: Any) -> tuple[Any, ...]:
    """The same, tensors in fp64: what is combined of them before it meets a row is not rounded to fp32 (and 0-d tensors widen no row)."""
    return tuple(v.to(torch.float64) if isinstance(v, Tensor) else v for v in values)
