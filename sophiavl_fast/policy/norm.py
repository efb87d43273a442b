"""RMSNorm in the form that megatron-core's layer specs ask for."""
from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm; the mark on its weight makes megatron sum the gradient over the ranks of a sequence-parallel group.

    torch has one kernel for it on a GPU and six passes over memory on a CPU: fp32 on a CPU goes another way.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        device = torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == torch.float32:
            return _InFewPasses.apply(x, self.weight, self.eps)  # type: ignore[no-any-return]
        return super().forward(x)


class _InFewPasses(torch.autograd.Function):
    """y = x r w with r = (mean x^2 + eps)^-1/2; dx = r (g w - x r mean(g w x r)), dw = sum g x r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        unit = x * inverse
        d_weight = (grad * unit).flatten(0, -2).sum(0)
        d_unit = grad * weight
        along = torch.linalg.vecdot(d_unit, unit).unsqueeze_(-1).div_(x.shape[-1])
        return d_unit.addcmul_(unit, along, value=-1).mul_(inverse), d_weight, None
