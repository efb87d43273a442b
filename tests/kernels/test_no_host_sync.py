"""The kernels' promise on a GPU: no .item(), no copy, no wait. Seen on a pretended CUDA device; and that device's own honesty."""
import os

import numpy as np
import pytest
import torch
from sophiavl_fast.kernels import grpo_loss, linear_logprob, logits_logprob, trust_advantage

from tests.pretend_cuda import pretended_cuda

BACKENDS = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["reference"]


@pytest.fixture
def pretence():
    with pretended_cuda() as found:
        yield found


@pytest.mark.parametrize("mistake", [
    lambda a, b: a + b, lambda a, b: b + a, lambda a, b: torch.cat([a, b]), lambda a, b: b.add_(a), lambda a, b: b[a.long()],
    lambda a, b: torch.where(a > 0, a, b),
    lambda a, b: a @ b, lambda a, b: torch.zeros(()).add_(a.sum()), lambda a, b: a.index_select(0, b.long()),
    lambda a, b: torch.stack([a.sum(), b.sum()]),
    lambda a, b: a * torch.arange(len(a)), lambda a, b: a.index_put_((b.long(),), b), lambda a, b: torch.nn.Linear(4, 2)(a), lambda a, b: a.mul_(b)])
def test_mixed_devices_are_caught(pretence, mistake):
    with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
        mistake(torch.arange(4.0, device="cuda"), torch.arange(4.0))


def test_what_is_legal_passes(pretence):
    there, here = torch.arange(4.0, device="cuda"), torch.arange(4.0)
    results = [there * torch.tensor(2.0), there[here.long()], there.clone().copy_(here), here.to(there), here.cuda(),
               there.new_zeros(2), torch.zeros_like(there), torch.tensor([1.0], device="cuda"), there[:2].view(2, 1),
               torch.full((2,), 1.0, device=there.device), here.to("cuda", torch.float64)]
    assert all(r.device == torch.device("cuda", 0) and r.is_cuda for r in results)
    back = [there.cpu(), there.to("cpu", copy=True), here.clone().copy_(there), torch.empty_like(there, device="cpu"), there.new_zeros(2, device="cpu")]
    assert all(r.device.type == "cpu" and not r.is_cuda for r in back) and type(there) is torch.Tensor
    layer = torch.nn.Linear(4, 2).to("cuda")
    layer(there).relu().sum().backward()
    assert layer.weight.grad.is_cuda and type(layer.weight) is torch.nn.Parameter


@pytest.mark.parametrize("mistake", [lambda a: a.numpy(), np.asarray, lambda a: np.array([1.0, 2.0]) + a.detach().numpy()])
def test_numpy_is_caught(pretence, mistake):
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        mistake(torch.arange(2.0, device="cuda"))


def test_pinned_memory_and_generators(pretence):
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        torch.zeros(2, device="cuda").pin_memory()
    with pytest.raises(RuntimeError, match="generator"):
        torch.multinomial(torch.ones(3, device="cuda"), 1, generator=torch.Generator())
    pinned = torch.empty(3, pin_memory=True)
    assert pinned.is_pinned() and not pinned.is_cuda


@pytest.mark.parametrize("kind,wait", [
    ("item", lambda a: a[0].item()), ("item", lambda a: bool(a[0] > 0)), ("tolist", lambda a: a.tolist()), ("download", lambda a: a.cpu()),
    ("nonzero", lambda a: a.nonzero()),
    ("mask as index", lambda a: a[a > 1]), ("upload", lambda a: torch.ones(3).to(a.device)),
    ("upload", lambda a: torch.tensor([1, 2], device=a.device)),
    ("repeat_interleave", lambda a: a.repeat_interleave(a.long())), ("synchronize", lambda a: torch.cuda.current_stream().synchronize()),
    ("upload of an index", lambda a: a[torch.tensor([1])])])
def test_waits_are_counted(pretence, kind, wait):
    a = torch.arange(3.0, device="cuda")
    with pretence.since() as found:
        wait(a)
    (counted, line, _), = found
    assert counted == kind and line.startswith("tests/kernels/test_no_host_sync.py:")


def test_what_waits_for_nothing_is_not_counted(pretence):
    a, pinned = torch.arange(3.0, device="cuda"), torch.ones(3).pin_memory()
    with pretence.since() as found:
        a[a > 1] = 0.0
        a.masked_fill(a > 1, 0).where(a > 0, 1)
        pinned.to("cuda", non_blocking=True)
        a.repeat_interleave(a.long(), output_size=1)
    assert not found


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_waits_for_nothing(pretence, backend):
    draw = lambda: torch.randn(7, device="cuda")
    bounds, advantage = torch.tensor([0, 3, 3, 7], device="cuda"), torch.ones(3, device="cuda")
    number = torch.tensor(0.1, device="cuda")
    options = {"old_logprob": draw(), "mask": draw() > 0, "ref_logprob": draw(), "kl_coef": 0.1, "rollout_logprob": draw(), "tis_cap": 2.0, "pre_clip": 1.0,
               "denominator": 7.0, "mismatch_mask": advantage > 0}
    logprob, entropy = draw().requires_grad_(), draw().requires_grad_()
    with pretence.since() as found:
        for more in ({"dual_clip": 3.0}, {"variant": "cispo"}, {"ratio": "sequence", "aggregate": "sequence"},
                     {"aggregate": "constant", "max_length": 9, "clip_low": number}):
            loss, stats = grpo_loss(logprob, advantage, bounds, entropy=entropy, entropy_coef=0.1, backend=backend, **options | more)
            loss.backward()
            assert loss.is_cuda and stats.is_cuda and logprob.grad.is_cuda
    assert not found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("known", [True, False])
def test_the_log_prob_head_waits_for_nothing(pretence, backend, known):
    hidden, weight = torch.randn(9, 16, device="cuda").requires_grad_(), torch.randn(40, 16, device="cuda").requires_grad_()
    target, bias = torch.randint(0, 40, (9,), device="cuda"), torch.zeros(40, device="cuda")
    target[2] = -100
    active, main_grad = torch.tensor([0, 4], device="cuda") if known else None, torch.zeros(40, 16, device="cuda")
    with pretence.since() as found:
        logprob, entropy = linear_logprob(hidden, weight, target, bias=bias, temperature=0.7, entropy=True, vocab_size=38, active=active,
                                          main_grad=main_grad, backend=backend)
        (logprob.sum() + entropy.sum()).backward()
        logits_logprob(hidden @ weight.T, target, backend=backend)[0].sum().backward()
    assert logprob.is_cuda and hidden.grad.is_cuda and weight.grad.is_cuda and main_grad.any()
    assert not found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["paper", "repo", "variance", "off"])
def test_the_advantages_wait_for_nothing(pretence, backend, mode):
    outcome, thinking, bounds = torch.tensor([1.0, 0, 1, 0, 1], device="cuda"), torch.rand(5, 2, device="cuda"), torch.tensor([0, 2, 2, 5], device="cuda")
    with pretence.since() as found:
        for more in ({}, {"normalize": "batch", "sigma_filter": 2.0}, {"uniform": "center", "quorum": 0.5, "alpha": torch.tensor(0.3, device="cuda")}):
            result = trust_advantage(outcome, thinking, bounds, mode=mode, backend=backend, **more)
            assert all(t.is_cuda for t in result)
    found.pop(next((k for k in found if k[0] == "upload" and k[1].startswith("tests/")), None), None)  # this test's own alpha
    assert not found
