"""First derivatives only: gradients that cannot be differentiated again, and say so."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Once(torch.autograd.Function):
    """A gradient as it is; `sources` are what it depends on, so that whoever differentiates it comes by here."""

    @staticmethod
    def forward(op: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f"{ctx.op}: second derivatives are not implemented")


def once(op: str, gradients: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients as they are; where autograd records its own backward pass (create_graph=True), differentiating them is a RuntimeError.

    Without the link to `sources` autograd would leave this op's part out of a second derivative, silently.
    """
    if not torch.is_grad_enabled():
        return tuple(gradients)
    linked = [x for x in sources if x is not None]
    return tuple(None if x is None else _Once.apply(op, x.detach(), *linked) for x in gradients)
