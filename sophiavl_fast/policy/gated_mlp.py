"""silu(gate) * up, with one tensor kept for the backward pass and one written by it.

megatron's unfused path keeps both halves, silu(gate) and up + offset, and its backward pass joins two halves by a copy; its
fused one is a torch.compile away. This is neither: [S, 2F] in, [S, F] out, the gradient written in place of where it goes.
"""
from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.autograd.function import once_differentiable


def use_gated_mlp(model: torch.nn.Module) -> None:
    """Give every megatron MLP of `model` this activation; they are gated by silu and have no biases."""
    for module in model.modules():
        if isinstance(module, MLP):
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
    both, bias = self.linear_fc1(hidden_states)
    assert bias is None
    return self.linear_fc2(silu_gate(both))  # type: ignore[no-any-return]


def silu_gate(both: Tensor) -> Tensor:
    """[..., 2F] (gate, then up) -> [..., F]: silu(gate) * up, in the input's dtype; differentiable."""
    return _SiluGate.apply(both)  # type: ignore[no-any-return]


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        both, = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        out = torch.empty_like(both)
        to_gate, to_up = out.chunk(2, -1)
        torch.mul(grad, up, out=to_up)  # borrowed as a workspace
        torch.ops.aten.silu_backward.grad_input(to_up, gate, grad_input=to_gate)
        torch.mul(F.silu(gate), grad, out=to_up)
        return out
