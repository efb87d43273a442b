"""trust_advantage against a loop over groups in plain Python floats (IEEE double)."""
from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sophiavl_fast.kernels import trust_advantage

NAN = math.nan


def fp32(x: float) -> float:
    """Outcomes are fp32 numbers, and a limit of 0.9 means the fp32 number nearest to it."""
    return torch.tensor(x).item()


def loop(outcomes, thinking, sizes, *, alpha=0.3, anneal=1.0, threshold=0.5, mode="paper", uniform="score", quorum=1.0, normalize="std",
         sigma_filter=None, eps=1e-6):
    """design: Trust-GRPO, the default reading, one group at a time. thinking: a list of K scores a response."""
    advantage, reward, gamma, used, equal = [], [], [], [], []
    first = 0
    for size in sizes:
        s, p = outcomes[first:first + size], thinking[first:first + size]
        first += size
        g, terms = group_terms(s, p, threshold, mode, quorum)
        r = [o + alpha * anneal * t for o, t in zip(s, terms or [0.0] * size)]
        reward += r
        gamma += g
        used += [terms is not None] * size
        equal += [len(set(s)) == 1] * size
        a = normalised(r, normalize, eps)
        if size and len(set(s)) == 1:
            a = {"score": a, "center": normalised(r, "mean", eps), "skip": [0.0] * size}[uniform]
        advantage += a
    if normalize == "batch":
        whole = normalised(reward, "std", eps)
        whole = [a if sigma_filter is None or abs(a) <= sigma_filter else 0.0 for a in whole]
        advantage = [w if uniform == "score" or not e else a for w, a, e in zip(whole, advantage, equal)]
    return advantage, reward, gamma, used


def group_terms(s, p, threshold, mode, quorum):
    """(gamma a response, gamma * thinking a response), or (NaNs, None) where the thinking term is dropped."""
    dropped = [NAN] * len(s), None
    mean = [sum(k) / len(k) for k in p]
    asked = [mode != "repo" or o >= fp32(0.2) for o in s]
    if mode == "repo":
        if s and (min(s) >= fp32(0.9) or max(s) <= fp32(0.1)):
            return dropped
        mean = [m if a else 0.0 for m, a in zip(mean, asked)]
    have = [not math.isnan(m) for m in mean]
    wanted = [h for h, a in zip(have, asked) if a]
    if not wanted or sum(wanted) / len(wanted) < quorum:
        return dropped
    if mode == "variance":
        gamma = [math.exp(-statistics.pvariance(k)) if h else NAN for k, h in zip(p, have)]
    elif mode == "off":
        gamma = [1.0] * len(s)
    else:
        right = [m for m, o, h in zip(mean, s, have) if h and o >= fp32(threshold)]
        wrong = [m for m, o, h in zip(mean, s, have) if h and o < fp32(threshold)]
        one = math.exp(min(0.0, statistics.fmean(right) - statistics.fmean(wrong))) if right and wrong else 1.0
        gamma = [one] * len(s)
    known = [g * m for g, m, h, a in zip(gamma, mean, have, asked) if h and a]
    return gamma, [g * m if h else sum(known) / len(known) for g, m, h in zip(gamma, mean, have)]


def normalised(r, normalize, eps):
    if normalize in ("none", "batch"):
        return list(r)
    if not r or max(r) == min(r):
        return [0.0] * len(r)
    mean = statistics.fmean(r)
    if normalize == "mean":
        return [x - mean for x in r]
    return [(x - mean) / (statistics.stdev(r) + eps) for x in r]


def check(outcomes, thinking, sizes, samples=1, backend="auto", **options):
    o = torch.tensor(outcomes, dtype=torch.float32)
    t = torch.tensor(thinking, dtype=torch.float32) if thinking else torch.zeros(0, samples)
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    got = trust_advantage(o, t if t.shape[1] > 1 else t[:, 0], bounds, backend=backend, **options)
    want = loop(o.tolist(), t.tolist(), sizes, **options)
    assert got.used.tolist() == want[3]
    for a, b in zip(got[:3], want[:3]):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), torch.tensor(b, dtype=torch.float64), rtol=1e-5, atol=2e-6, equal_nan=True)
    return got


OUTCOMES = st.sampled_from([0.0, 1.0, 0.0, 1.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.5, 0.9, 0.95, -0.5])
SCORES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5, 0.8, 0.9, 1.0, NAN, NAN])


@st.composite
def batches(draw, samples):
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    total = sum(sizes)
    outcomes = draw(st.lists(OUTCOMES, min_size=total, max_size=total))
    if draw(st.booleans()):  # whole groups alike, often
        outcomes = [o for i, n in enumerate(sizes) for o in [float(i % 2)] * n]
    row = st.lists(SCORES, min_size=samples, max_size=samples)
    return outcomes, draw(st.lists(row, min_size=total, max_size=total)), sizes


@settings(max_examples=400, deadline=None)
@given(data=st.data(), mode=st.sampled_from(["paper", "repo", "variance", "off"]), uniform=st.sampled_from(["score", "center", "skip"]),
       normalize=st.sampled_from(["std", "mean", "batch", "none"]), quorum=st.sampled_from([1.0, 0.5, 0.34, 0.01]),
       anneal=st.sampled_from([1.0, 0.368]), threshold=st.sampled_from([0.5, 0.3]), sigma=st.sampled_from([None, 1.0, 3.0]))
def test_equals_the_loop(data, mode, uniform, normalize, quorum, anneal, threshold, sigma):
    samples = 3 if mode == "variance" else data.draw(st.sampled_from([1, 2]))
    check(*data.draw(batches(samples)), samples, mode=mode, uniform=uniform, normalize=normalize, quorum=quorum, anneal=anneal,
          threshold=threshold, sigma_filter=sigma if normalize == "batch" else None)


def test_worked_case_by_hand():
    """Wrong responses think better than the right one: gamma = exp(0.2 - 0.8) = 0.5488."""
    got = trust_advantage(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.2, 0.9, 0.7]), torch.tensor([0, 3]), alpha=0.3, anneal=0.5)
    torch.testing.assert_close(got.gamma, torch.full((3,), 0.5488116))
    torch.testing.assert_close(got.reward, torch.tensor([1.0164643, 0.0740896, 0.0576252]))
    assert abs(got.advantage.sum()) < 1e-6 and got.used.all()


def test_trust_never_rewards_nor_silences_the_judge():
    high, low = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0, 4])
    assert (trust_advantage(high, torch.tensor([0.9, 0.8, 0.1, 0.2]), low).gamma == 1).all()
    torch.testing.assert_close(trust_advantage(high, torch.tensor([0.0, 0.0, 1.0, 1.0]), low).gamma, torch.full((4,), math.exp(-1)))


@pytest.mark.parametrize("value", [0.31, 1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("normalize", ["std", "mean", "batch"])
def test_equal_rewards_have_advantage_exactly_zero(value, size, normalize):
    """Eight fp32 rewards of 0.31 have a computed std above 0: max = min is what is tested."""
    got = trust_advantage(torch.full((size,), value), torch.full((size,), 0.7), torch.tensor([0, size]), normalize=normalize)
    assert (got.advantage == 0).all()


def test_group_of_one_keeps_its_place_in_the_batch():
    """With normalize=batch groups of one are the rule (REINFORCE): they are whitened over the batch, not zeroed."""
    outcome = torch.tensor([1.0, 0.0, 1.0, 1.0])
    got = trust_advantage(outcome, torch.full((4,), NAN), torch.arange(5), mode="off", normalize="batch")
    torch.testing.assert_close(got.advantage, (outcome - outcome.mean()) / (outcome.std() + 1e-6))


def test_sigma_filter_zeroes_outliers():
    """255 ones and a zero: z = -15.97 is dropped, the ones stay."""
    outcome = torch.ones(256).index_fill(0, torch.tensor([9]), 0)
    got = trust_advantage(outcome, torch.full((256,), NAN), torch.arange(257), normalize="batch", sigma_filter=3.0)
    assert got.advantage[9] == 0 and (got.advantage != 0).sum() == 255


def test_a_missing_score_is_never_zero():
    """Below the quorum the group is scored by its outcomes; above it the missing response is pushed neither way."""
    outcome, thinking, bounds = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.8, NAN, 0.4, 0.2]), torch.tensor([0, 4])
    strict = trust_advantage(outcome, thinking, bounds)
    assert torch.equal(strict.reward, outcome) and not strict.used.any() and strict.gamma.isnan().all()
    lenient = trust_advantage(outcome, thinking, bounds, quorum=0.75)
    torch.testing.assert_close(lenient.reward[1], 1 + 0.3 * (0.8 + 0.4 + 0.2) / 3 * torch.ones(()))
    assert lenient.used.all() and (lenient.gamma == 1).all()


def test_uniform_groups_at_the_three_settings():
    """All right: by the formula the judge drives at full strength whatever alpha is; centred, alpha and annealing act."""
    outcome, thinking, bounds = torch.ones(4), torch.tensor([0.9, 0.5, 0.5, 0.1]), torch.tensor([0, 4])
    run = lambda alpha, uniform: trust_advantage(outcome, thinking, bounds, alpha=alpha, uniform=uniform).advantage
    torch.testing.assert_close(run(0.3, "score"), run(0.03, "score"), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(run(0.3, "center"), 10 * run(0.03, "center"))
    torch.testing.assert_close(run(0.3, "center"), 0.3 * (thinking - 0.5))
    assert not run(0.3, "skip").any()


def test_thousands_of_ragged_groups():
    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 17, (3000,), generator=g)
    total = int(sizes.sum())
    outcome = (torch.rand(total, generator=g) < 0.5).float()
    thinking = torch.rand(total, generator=g).masked_fill(torch.rand(total, generator=g) < 0.02, NAN)
    check(outcome.tolist(), thinking[:, None].tolist(), sizes.tolist(), quorum=0.8)


def test_coefficients_may_be_tensors_and_inputs_fp64():
    outcome, thinking, bounds = torch.tensor([1.0, 0.0, 0.3]), torch.tensor([0.4, 0.6, 0.7]), torch.tensor([0, 3], dtype=torch.int32)
    plain = trust_advantage(outcome, thinking, bounds, alpha=0.25, anneal=0.5)
    tensors = trust_advantage(outcome.double(), thinking.double(), bounds, alpha=torch.tensor(0.25), anneal=torch.tensor(0.5))
    torch.testing.assert_close(tuple(plain), tuple(tensors))


def test_coefficients_are_multiplied_in_fp64():
    """alpha * anneal of fp32 tensors is not rounded to fp32 before it meets a score."""
    alpha, anneal, thinking = torch.tensor(0.1), torch.tensor(0.3), torch.rand(64, generator=torch.Generator().manual_seed(0))
    got = trust_advantage(torch.zeros(64), thinking, torch.tensor([0, 64]), alpha=alpha, anneal=anneal, mode="off")
    assert got.reward.tolist() == (alpha.double() * anneal.double() * thinking.double()).float().tolist()


@pytest.mark.parametrize("normalize", ["std", "batch"])
def test_eps_zero_divides_nothing_by_nothing(normalize):
    got = trust_advantage(torch.ones(4), torch.full((4,), 0.5), torch.tensor([0, 4]), eps=0.0, normalize=normalize)
    assert (got.advantage == 0).all()


def test_no_groups():
    got = trust_advantage(torch.zeros(0), torch.zeros(0), torch.tensor([0]))
    assert all(len(x) == 0 for x in got)
