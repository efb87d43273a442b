"""grpo_loss where exp overflows: what has no weight adds exactly nothing, the rest saturates as its docstring says.

Run once more on Triton's interpreted kernels by tests/kernels/interpreter/test_saturation.py.
"""
from __future__ import annotations

import math
import os

import pytest
import torch
from sophiavl_fast.kernels import STATS, grpo_loss

BACKEND = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "reference"
INF = math.inf
BOUNDS = torch.tensor([0, 2, 4])
NEW, OLD = torch.tensor([-1.0, -2.0, -1.5, -0.5]), torch.tensor([-1.1, -1.9, -1.5, -0.6])
FAR = 200.0  # exp of it is inf in fp32, and finite in fp64


def run(logprob=NEW, advantage=(1.0, -1.0), **options):
    """(loss, gradient, statistics by name)."""
    leaf = logprob.clone().requires_grad_()
    loss, stats = grpo_loss(leaf, torch.tensor(advantage), BOUNDS, **{"old_logprob": OLD, "backend": BACKEND} | options)
    return loss.item(), torch.autograd.grad(loss, leaf)[0].tolist(), dict(zip(STATS, stats.tolist()))


@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0), torch.tensor(0)], ids=["number", "tensor", "integer"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_terms_without_weight_do_not_enter(zero, kl, aggregate):
    """A reference a world away, and an entropy that overflowed, are statistics alone."""
    plain = run(aggregate=aggregate)
    for far in (NEW + FAR, torch.tensor([INF, -INF, -1.0, 1e30])):
        loss, gradient, stats = run(aggregate=aggregate, ref_logprob=far, kl=kl, kl_coef=zero, entropy=torch.full((4,), INF), entropy_coef=zero)
        assert (loss, gradient) == plain[:2] and math.isfinite(loss)
        assert stats["entropy"] == INF
    assert run(ref_logprob=NEW + FAR, kl="k3", kl_coef=zero)[2]["kl_ref"] == INF  # honest
    assert run(ref_logprob=NEW + FAR, kl="k3", kl_coef=0.1)[0] == INF and run(ref_logprob=NEW + FAR, kl="k3", kl_coef=0.1)[1] == [-INF] * 4


VARIANTS = [{}, {"dual_clip": 3.0}, {"variant": "cispo"}, {"ratio": "sequence"}, {"ratio": "sequence", "variant": "cispo"},
            {"ratio": "sequence", "dual_clip": 3.0, "aggregate": "sequence"}, {"clip_high": INF}, {"clip_high": INF, "variant": "cispo"}]


@pytest.mark.parametrize("weights", [{}, {"tis_cap": 2.0}, {"tis_cap": INF}], ids=["none", "capped", "uncapped"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_advantage_zero_is_zero_whatever_the_ratio(variant, weights):
    """Loss and gradient of the first response are those of the second alone; ratios of inf and NaN, log-probs of -inf, weights of inf."""
    rollout = {"rollout_logprob": torch.tensor([-FAR, -1.0, -1.5, -0.5])} if weights else {}
    mask = torch.tensor([False, False, True, True])
    alone = run(advantage=(0.0, -1.0), mask=mask, **variant, **weights, **rollout)
    for first, old in ((-1.0, -1.0 - FAR), (-INF, -1.0), (-INF, -INF), (-1.0, -INF), (-1.0, -1.0)):
        new, anchor = NEW.clone(), OLD.clone()
        new[0], anchor[0] = first, old
        loss, gradient, _ = run(new, (0.0, -1.0), old_logprob=anchor, **variant, **weights, **rollout)
        assert (loss, gradient[:2], gradient[2:]) == (alone[0], [0, 0], alone[1][2:]) and math.isfinite(loss)


def test_what_saturates():
    """A ratio of inf: clipped for a positive advantage, inf for a negative one, unless the dual clip holds it; CISPO's weight is bounded."""
    new, old = torch.full((4,), -1.0), torch.tensor([-1.0 - FAR, -1.0, -1.0 - FAR, -1.0])
    go = lambda advantage, **o: run(new, advantage, old_logprob=old, **o)[:2]
    assert run(new, old_logprob=old)[2]["ratio_max"] == INF
    loss, gradient = go((1.0, 0.0))
    assert loss == pytest.approx(-1.2 - 1) and gradient == [0, -1, 0, 0]
    loss, gradient = go((0.0, -1.0))
    assert loss == INF and gradient == [0, 0, INF, 1]
    loss, gradient = go((0.0, -1.0), dual_clip=3.0)
    assert loss == pytest.approx(3 + 1) and gradient == [0, 0, 0, 1]
    loss, gradient = go((0.0, -1.0), pre_clip=2.0)
    assert loss == pytest.approx(math.e ** 2 + 1, rel=1e-6) and gradient == [0, 0, 0, 1]
    loss, gradient = go((1.0, -1.0), variant="cispo")
    assert loss == pytest.approx(0, abs=1e-6) and gradient == pytest.approx([-1.2, -1, 1.2, 1])
    # the engine gave the token no chance to count: a weight that underflows to 0 takes it out
    loss, gradient = go((0.0, -1.0), rollout_logprob=torch.tensor([0.0, -1.0, 0.0, -1.0]), tis_cap=2.0)
    assert loss == pytest.approx(1) and gradient == [0, 0, 0, 1]
