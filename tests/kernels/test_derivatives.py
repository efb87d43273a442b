"""What the ops do not differentiate they refuse: second derivatives, tangents, torch.func, and inputs that get no gradient.

Second derivatives once more on Triton's interpreted kernels: tests/kernels/interpreter/test_derivatives.py.
"""
from __future__ import annotations

import os

import pytest
import torch
from sophiavl_fast.kernels import grpo_loss, linear_logprob, logits_logprob, trust_advantage
from torch.autograd import forward_ad

BACKEND = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "reference"
T, H, V = 6, 4, 7
DRAW = torch.Generator().manual_seed(0)
BOUNDS, ADVANTAGE, OLD = torch.tensor([0, 3, 6]), torch.tensor([1.0, -0.5]), -torch.rand(T, generator=DRAW)
WEIGHT, TARGET = torch.randn(V, H, generator=DRAW), torch.tensor([0, 6, -100, 2, 1, 5])
RUNS = {
    "grpo_loss": ((T,), lambda x: grpo_loss(x, ADVANTAGE, BOUNDS, old_logprob=OLD, backend=BACKEND)[0]),
    "linear_logprob": ((T, H), lambda x: linear_logprob(x, WEIGHT, TARGET, backend=BACKEND)[0].sum()),
    "logits_logprob": ((T, V), lambda x: logits_logprob(x, TARGET, backend=BACKEND)[0].sum()),
    "logits_logprob, inplace": ((T, V), lambda x: logits_logprob(x * 1.0, TARGET, inplace=True, backend=BACKEND)[0].sum()),
}
OPS = pytest.mark.parametrize("name", RUNS)


def draw(name):
    return -torch.rand(RUNS[name][0], generator=torch.Generator().manual_seed(1))


def second(run, x):
    """Of a sum whose other term has one: a part left out silently would go unnoticed here."""
    (first,) = torch.autograd.grad(run(x) + (x ** 3).sum(), x, create_graph=True)
    return torch.autograd.grad(first.sum(), x)


@OPS
def test_second_derivatives_are_refused(name):
    x, run = draw(name).requires_grad_(), RUNS[name][1]
    line = f"{name.split(',')[0]}: second derivatives are not implemented"
    with pytest.raises(RuntimeError, match=line):
        second(run, x)
    with pytest.raises(RuntimeError, match=line):  # the loss's square: its gradient's factor depends on x too
        second(lambda y: run(y) ** 2, x)
    # the first derivative is what it is without a graph of its own
    (recorded,) = torch.autograd.grad(run(x), x, create_graph=True)
    assert torch.equal(recorded, torch.autograd.grad(run(x), x)[0])


def test_a_compiled_loss_refuses_them_too():
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="grpo_loss: second derivatives are not implemented"):
        second(torch.compile(RUNS["grpo_loss"][1], backend="eager"), draw("grpo_loss").requires_grad_())


@OPS
@pytest.mark.parametrize("compiled", [False, True])
def test_tangents_are_refused(name, compiled):
    x, run = draw(name), RUNS[name][1]
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, backend="eager")
    line = "= a tensor with a tangent: expected a plain one: forward-mode differentiation is not implemented"
    with pytest.raises(ValueError, match=line):
        torch.func.jvp(run, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(ValueError, match=line):
        run(forward_ad.make_dual(x, torch.ones_like(x)))
    run(x)  # outside of the level as ever


@OPS
def test_transforms_are_refused(name):
    x, run = draw(name), RUNS[name][1]
    with pytest.raises(ValueError, match=r"= a tensor under torch\.vmap: expected a plain one: vmap is not supported"):
        torch.func.vmap(run)(torch.stack([x, x]))
    with pytest.raises(ValueError, match=r"= a tensor under torch\.func: expected a plain one: gradients are torch\.autograd's, once"):
        torch.func.grad(run)(x)


def test_trust_refuses_them_all():
    run = lambda thinking: trust_advantage(torch.tensor([1.0, 0.0]), thinking, torch.tensor([0, 2]), backend=BACKEND).advantage.sum()
    x = torch.tensor([0.3, 0.6])
    with pytest.raises(ValueError, match=r"thinking = .*forward-mode"):
        torch.func.jvp(run, (x,), (torch.ones(2),))
    with pytest.raises(ValueError, match=r"thinking = a tensor under torch\.vmap"):
        torch.func.vmap(run)(torch.stack([x, x]))
    for transform in (torch.func.grad(run), lambda y: run(y.requires_grad_())):
        with pytest.raises(ValueError, match=r"thinking = a tensor (under torch\.func|that requires a gradient): expected"):
            transform(x.clone())


LOSS = {"logprob": draw("grpo_loss"), "advantage": ADVANTAGE, "cu_seqlens": BOUNDS, "old_logprob": OLD, "ref_logprob": OLD, "rollout_logprob": OLD,
        "entropy": -OLD, "denominator": 6.0, "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "pre_clip": 9.0, "kl_coef": 0.1, "tis_cap": 2.0,
        "entropy_coef": 0.1}
NUMBERS = [name for name, value in LOSS.items() if isinstance(value, float)]


@pytest.mark.parametrize("name", ["advantage", "old_logprob", "ref_logprob", "rollout_logprob", *NUMBERS])
def test_the_loss_refuses_what_gets_no_gradient(name):
    given = LOSS | {name: torch.as_tensor(LOSS[name]).clone().requires_grad_()}
    with pytest.raises(ValueError, match=rf"{name} = a tensor that requires a gradient: expected {name}.detach\(\): this op has no gradient for it"):
        grpo_loss(**given, backend=BACKEND)
    with torch.no_grad():
        grpo_loss(**given, backend=BACKEND)


def test_so_do_the_others():
    x, number = draw("linear_logprob"), torch.tensor(0.9, requires_grad=True)
    for run in (lambda: linear_logprob(x, WEIGHT, TARGET, temperature=number, backend=BACKEND),
                lambda: logits_logprob(draw("logits_logprob"), TARGET, temperature=number, backend=BACKEND)):
        with pytest.raises(ValueError, match=r"temperature = a tensor that requires a gradient: expected temperature.detach\(\)"):
            run()
        with torch.no_grad():
            run()
    for name in ("alpha", "anneal", "threshold"):
        with pytest.raises(ValueError, match=f"{name} = a tensor that requires a gradient"):
            trust_advantage(torch.tensor([1.0, 0.0]), torch.tensor([0.2, 0.4]), torch.tensor([0, 2]), **{name: number}, backend=BACKEND)
