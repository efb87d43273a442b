"""The activation and the norm written for few passes over memory, against torch's own and against finite differences."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sophiavl_fast.policy.gated_mlp import silu_gate
from sophiavl_fast.policy.norm import _InFewPasses


@pytest.mark.parametrize("shape", [(7, 3, 20), (1, 2), (0, 1, 8)])
def test_silu_gate_is_silu_times_up(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(silu_gate(x), F.silu(gate) * up)
    assert not x.numel() or torch.autograd.gradcheck(silu_gate, (x,))


def test_silu_gate_leaves_its_incoming_gradient_alone():
    x, grad = torch.randn(5, 8, requires_grad=True), torch.randn(5, 4)
    kept = grad.clone()
    silu_gate(x).backward(grad)
    assert torch.equal(grad, kept)


@pytest.mark.parametrize("shape", [(5, 3, 16), (1, 1, 2), (0, 1, 8)])
def test_norm_is_torchs(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(_InFewPasses.apply(x, weight, 1e-6), F.rms_norm(x, shape[-1:], weight, 1e-6))
    assert not x.numel() or torch.autograd.gradcheck(lambda x, w: _InFewPasses.apply(x, w, 1e-6), (x, weight))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e15])
def test_norm_in_fp32_is_as_exact_as_torchs(scale):
    """Tiny rows are where eps decides, huge ones where a sum of squares could overflow."""
    x, weight, grad = scale * torch.randn(64, 1, 192), torch.randn(192), torch.randn(64, 1, 192)
    truth = _outputs_and_gradients(F.rms_norm, x.double(), weight.double(), grad.double())
    torchs = _outputs_and_gradients(F.rms_norm, x, weight, grad)
    ours = _outputs_and_gradients(lambda x, _, w, eps: _InFewPasses.apply(x, w, eps), x, weight, grad)
    for exact, theirs, mine in zip(truth, torchs, ours, strict=True):
        size = exact.abs().max()
        assert (mine - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-6 * size


def _outputs_and_gradients(norm, x, weight, grad):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = norm(x, weight.shape, weight, 1e-6)
    y.backward(grad)
    return y.detach(), x.grad, weight.grad
