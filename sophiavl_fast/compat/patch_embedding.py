"""Qwen's patch embedding as the matrix product that it is.

transformers writes it as a 3-D convolution whose stride is its kernel, over one patch a row. cuDNN's 3-D convolutions take TF32 in fp32 by default and
slow paths in bf16; the rollout engine multiplies matrices. So does everything here that computes rather than checks.
"""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PatchProduct(nn.Conv3d):
    """nn.Conv3d that multiplies matrices where an input [N, C, T, P, P] is exactly one kernel a row."""

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[1:] != self.weight.shape[1:] or any(self.padding):
            return super().forward(input)
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def use_products(model: nn.Module) -> None:
    """Turn the 3-D convolutions of `model` into PatchProduct, in place; names and weights stay."""
    for module in model.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = PatchProduct
