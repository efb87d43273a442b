"""linear_logprob and logits_logprob against log_softmax in float64."""
from __future__ import annotations

import pytest
import torch
from sophiavl_fast.kernels import linear_logprob


def make(T=13, H=8, V=37, *, seed=0, scale=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(T, H, generator=g) * scale).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (T,), generator=g)


def oracle(hidden, weight, target, bias=None, temperature=1.0):
    """Per-row log-softmax in float64; rows of target -100 give 0."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logp = (logits / temperature).log_softmax(1)
    live = target != -100
    picked = logp.gather(1, target.clamp(min=0)[:, None])[:, 0].where(live, 0)
    entropy = -(logp.exp() * logp.clamp(min=-1e30)).sum(1).where(live, 0)
    return picked, entropy


def gradients(outputs, inputs, seed=1):
    g = torch.Generator().manual_seed(seed)
    loss = sum((o.double() * torch.randn(o.shape, generator=g, dtype=torch.float64)).sum() for o in outputs)
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("shape", [(1, 1, 2), (13, 8, 37), (257, 16, 128), (64, 5, 1000)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1024, 7])
def test_matches_log_softmax(shape, temperature, chunk, monkeypatch):
    monkeypatch.setattr("sophiavl_fast.kernels.reference_logprob.SMALL", 1)
    hidden, weight, target = make(*shape)
    target[::5] = -100
    bias = torch.randn(shape[2], requires_grad=True)
    got = linear_logprob(hidden, weight, target, bias=bias, temperature=temperature, entropy=True, chunk=chunk)
    want = oracle(hidden, weight, target, bias, temperature)
    for a, b in zip(got, want):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6)
    for a, b in zip(gradients(got, (hidden, weight, bias)), gradients(want, (hidden, weight, bias))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
