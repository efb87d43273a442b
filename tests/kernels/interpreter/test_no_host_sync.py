"""Triton's host code on a pretended CUDA device: plans, workspaces, launches and backward passes of a GPU, kernels interpreted; no wait anywhere."""
from __future__ import annotations

import pytest
import torch
from sophiavl_fast.kernels import linear_logprob, triton_logprob, triton_logprob_plans
from sophiavl_fast.kernels.dispatch import MODULES, resolve

from tests.kernels.test_no_host_sync import (  # noqa: F401
    pretence,
    test_the_advantages_wait_for_nothing,
    test_the_log_prob_head_waits_for_nothing,
    test_the_loss_waits_for_nothing,
)
from tests.pretend_cuda import CUDA


def test_a_gpu_takes_triton(pretence):  # noqa: F811
    assert {resolve(op, "auto", CUDA, torch.float32) for op in MODULES} == {"triton"}


@pytest.mark.parametrize("few", [40, 20])
@pytest.mark.parametrize("known", [True, False])
def test_bf16_as_an_h100_would(pretence, monkeypatch, few, known):  # noqa: F811
    """The plans of sm_90 with tensor descriptors; only the 16-bit product with an fp32 result, which CPUs lack, is written by hand."""
    product = lambda a, b, out, *, add: out.copy_(torch.addmm(out, a.float(), b.float()) if add else a.float() @ b.float())
    monkeypatch.setattr(triton_logprob, "_multiply", product)
    monkeypatch.setattr(triton_logprob_plans, "FEW", few)
    rows, draw = 40, torch.Generator().manual_seed(0)
    made = [torch.randn(n, 16, generator=draw).bfloat16() for n in (rows, 64)]
    target, active = torch.randint(0, 64, (rows,), generator=draw), torch.arange(0, rows, 3) if known else None

    def gradients(device, backend):
        hidden, weight = (x.to(device).requires_grad_() for x in made)
        where = None if active is None else active.to(device)
        targets, main_grad = target.to(device), torch.zeros(64, 16, device=device)
        with pretence.since() as found:
            logprob, entropy = linear_logprob(hidden, weight, targets, entropy=True, active=where, main_grad=main_grad, backend=backend)
            (logprob.sum() + entropy.sum()).backward()
        assert device == "cpu" or not found
        return [t.cpu().float() for t in (logprob.detach(), entropy.detach(), hidden.grad, main_grad)]

    for a, b in zip(gradients("cuda", "auto"), gradients("cpu", "reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2 * b.abs().max().item())
