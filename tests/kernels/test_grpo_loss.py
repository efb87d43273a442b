"""grpo_loss against a loop over single tokens in float64, gradients by autograd on scalars."""
from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sophiavl_fast.kernels import STATS, SUMS, grpo_loss, stats

LENGTHS = [3, 0, 5, 1, 0, 4]
CHOICES = {
    "variant": ["ppo", "cispo"], "ratio": ["token", "sequence"], "aggregate": ["token", "sequence", "constant"], "clip": [(0.2, 0.2), (0.1, 0.4)],
    "dual_clip": [None, 1.5], "pre_clip": [None, 0.3], "kl": [None, "k1", "k2", "k3"], "tis_cap": [None, 1.1], "mismatch": [None, "B", "T"],
    "entropy": [False, True], "mask": [False, True], "old": [True, False], "advantage": ["B", "T"], "denominator": [None, 7.0],
}


def scene(choice: dict, seed: int, lengths=LENGTHS, dtype=torch.float64):
    """Random tensors and the options of a choice; None where the choice is not a legal one."""
    if choice["dual_clip"] and choice["variant"] == "cispo":
        return None
    g = torch.Generator().manual_seed(seed)
    T, B = sum(lengths), len(lengths)
    randn = lambda *n: torch.randn(*n, generator=g, dtype=torch.float64).to(dtype)
    logprob = -randn(T).abs() - 0.1
    near = lambda scale: logprob + scale * randn(T)
    options = {
        "old_logprob": near(0.4) if choice["old"] else None, "mask": torch.rand(T, generator=g) < 0.7 if choice["mask"] else None,
        "denominator": choice["denominator"], "variant": choice["variant"], "ratio": choice["ratio"], "aggregate": choice["aggregate"],
        "max_length": 9.0 if choice["aggregate"] == "constant" else None, "clip_low": choice["clip"][0], "clip_high": choice["clip"][1],
        "dual_clip": choice["dual_clip"], "pre_clip": choice["pre_clip"], "ref_logprob": near(0.5) if choice["kl"] else None,
        "kl": choice["kl"] or "k3", "kl_coef": 0.3 if choice["kl"] else 0.0, "rollout_logprob": near(0.3), "tis_cap": choice["tis_cap"],
        "mismatch_mask": None if choice["mismatch"] is None else torch.rand(B if choice["mismatch"] == "B" else T, generator=g) < 0.6,
        "entropy": randn(T).abs() if choice["entropy"] else None, "entropy_coef": 0.2 if choice["entropy"] else 0.0,
    }
    advantage = randn(B if choice["advantage"] == "B" else T)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)])
    return logprob, advantage, bounds, options


def loop(logprob, advantage, bounds, o):
    """The contract, one token at a time: (loss as a float64 scalar with a graph, statistics by name)."""
    B, T = len(bounds) - 1, len(logprob)
    s = dict.fromkeys(STATS, 0.0)
    loss, policy = torch.zeros((), dtype=torch.float64), 0.0
    per = lambda x, i, t: x[i] if len(x) == B else x[t]
    for i in range(B):
        tokens = [t for t in range(int(bounds[i]), int(bounds[i + 1])) if o["mask"] is None or o["mask"][t]]
        kept = [t for t in tokens if o["mismatch_mask"] is None or per(o["mismatch_mask"], i, t)]
        s["tokens"] += len(tokens)
        s["kept"] += len(kept)
        s["sequences"] += bool(tokens)
        old = {t: (logprob if o["old_logprob"] is None else o["old_logprob"])[t].detach() for t in tokens}
        for t in tokens:
            diff = abs(float(old[t] - o["rollout_logprob"][t]))
            s["rollout_diff"] += diff
            s["rollout_diff_max"] = max(s["rollout_diff_max"], diff)
        for t in kept:
            a = per(advantage, i, t)
            delta = logprob[t] - old[t] if o["ratio"] == "token" else sum(logprob[u] - old[u] for u in kept) / len(kept)
            s["kl_old"] += float(old[t] - logprob[t])
            if o["pre_clip"] is not None and abs(delta) > o["pre_clip"]:
                s["pre_clipped"] += 1
                delta = torch.tensor(math.copysign(o["pre_clip"], delta), dtype=torch.float64)
            r = delta.exp()
            s["ratio"] += float(r)
            s["ratio_max"] = max(s["ratio_max"], float(r))
            low, high = 1 - o["clip_low"], 1 + o["clip_high"]
            bounded = min(max(float(r), low), high)
            if o["variant"] == "cispo":
                term = -bounded * a * logprob[t]
                s["clipped_low"] += float(r) < low
                s["clipped_high"] += float(r) > high
            else:
                term = -r * a if float(r * a) <= float(bounded * a) else -bounded * a
                s["clipped_low"] += float(r) < low and float(a) < 0
                s["clipped_high"] += float(r) > high and float(a) > 0
                if o["dual_clip"] is not None and float(a) < 0 and float(term) > -o["dual_clip"] * float(a):
                    term = -o["dual_clip"] * a
                    s["dual_clipped"] += 1
            s["clipped"] = s["clipped_low"] + s["clipped_high"]
            if o["tis_cap"] is not None:
                weight = math.exp(float(old[t] - o["rollout_logprob"][t]))
                s["tis_capped"] += weight > o["tis_cap"]
                s["tis_weight"] += min(weight, o["tis_cap"])
                term = term * min(weight, o["tis_cap"])
            w = {"token": 1.0, "sequence": 1 / len(tokens), "constant": 1 / (o["max_length"] or 1)}[o["aggregate"]] / (o["denominator"] or 1)
            policy += w * float(term)
            if o["ref_logprob"] is not None:
                d = o["ref_logprob"][t] - logprob[t]
                k = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[o["kl"]]
                s["kl_ref"] += float(k)
                term = term + o["kl_coef"] * k
            if o["entropy"] is not None:
                s["entropy"] += float(o["entropy"][t])
                term = term - o["entropy_coef"] * o["entropy"][t]
            loss = loss + w * term
    assert bounds[-1] == T
    return loss, s | {"loss": float(loss), "policy_loss": policy}


def compare(choice, seed, lengths=LENGTHS):
    made = scene(choice, seed, lengths)
    if made is None:
        return
    logprob, advantage, bounds, options = made
    inputs = [logprob.requires_grad_()] + ([options["entropy"].requires_grad_()] if choice["entropy"] else [])
    loss, vector = grpo_loss(logprob, advantage, bounds, **options)
    want, named = loop(logprob, advantage, bounds, options)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(dict(zip(STATS, vector.tolist())), named, rtol=1e-5, atol=1e-6)
    if want.requires_grad:
        for a, b in zip(torch.autograd.grad(loss, inputs, allow_unused=True), torch.autograd.grad(want, inputs, allow_unused=True)):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


@pytest.mark.parametrize(("first", "second"), itertools.combinations(CHOICES, 2))
def test_every_pair_of_options(first, second):
    plain = {name: values[0] for name, values in CHOICES.items()}
    for seed, (a, b) in enumerate(itertools.product(CHOICES[first], CHOICES[second])):
        compare(plain | {first: a, second: b}, seed)


@settings(max_examples=150, deadline=None)
@given(choice=st.fixed_dictionaries({k: st.sampled_from(v) for k, v in CHOICES.items()}), seed=st.integers(0, 10 ** 6),
       lengths=st.lists(st.integers(0, 5), max_size=5))
def test_any_options_and_lengths(choice, seed, lengths):
    # A response a token or a token a response would make [B] and [T] the same shape: the first reading holds there.
    if sum(lengths) != len(lengths):
        compare(choice, seed, lengths)


def test_fp32_in_and_out():
    plain = {name: values[-1] for name, values in CHOICES.items()} | {"dual_clip": None}
    made = scene(plain, 3, dtype=torch.float32)
    wide = scene(plain, 3, dtype=torch.float64)
    got, want = grpo_loss(*made[:3], **made[3])[0], grpo_loss(*wide[:3], **wide[3])[0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_coefficients_may_be_tensors():
    choice = {name: values[-1] for name, values in CHOICES.items()} | {"variant": "ppo"}
    logprob, advantage, bounds, options = scene(choice, 5, dtype=torch.float32)
    names = ("denominator", "max_length", "clip_low", "clip_high", "dual_clip", "pre_clip", "kl_coef", "tis_cap", "entropy_coef")
    mixed = options | {name: torch.tensor(options[name]) for name in names if options[name] is not None and name != "clip_low"}
    for got, want in zip(grpo_loss(logprob, advantage, bounds, **mixed), grpo_loss(logprob, advantage, bounds, **options)):
        torch.testing.assert_close(got, want)


def test_fp64_calls_combine_coefficients_in_fp64():
    """1 / 3 / 7 and 1 - 0.2, of fp32 and integer tensors: not rounded to fp32 before they meet a row."""
    choice = {name: values[-1] for name, values in CHOICES.items()} | {"variant": "ppo", "aggregate": "constant"}
    logprob, advantage, bounds, options = scene(choice, 9)
    numbers = {"max_length": 3, "denominator": 7, "clip_low": 0.2, "kl_coef": 0.1}
    tensors = {name: torch.tensor(value) for name, value in numbers.items()}
    exact = {name: value.item() for name, value in tensors.items()}  # 0.2 as fp32 has it
    run = lambda given: grpo_loss(logprob, advantage, bounds, **options | given)[0]
    torch.testing.assert_close(run(tensors), run(exact), rtol=1e-15, atol=0)


@pytest.mark.parametrize("choice", [{"ratio": "token"}, {"ratio": "sequence"}, {"variant": "cispo", "dual_clip": None}, {"kl": "k2", "aggregate": "sequence"}])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_masked_places_never_leak(choice, poison):
    """The loss, its gradient and the statistics are those of clean inputs, whatever the masked places hold."""
    choice = {name: values[-1] for name, values in CHOICES.items()} | {"variant": "ppo", "mismatch": None, "old": True} | choice
    logprob, advantage, bounds, options = scene(choice, 11, dtype=torch.float32)
    dead = ~options["mask"]
    per_token = [options[k] for k in ("old_logprob", "ref_logprob", "rollout_logprob", "entropy")] + [advantage]
    logprob.requires_grad_()
    clean = grpo_loss(logprob, advantage, bounds, **options)
    (clean_grad,) = torch.autograd.grad(clean[0], logprob)
    with torch.no_grad():
        for x in [logprob, *per_token]:
            x[dead] = poison
    loss, vector = grpo_loss(logprob, advantage, bounds, **options)
    (grad,) = torch.autograd.grad(loss, logprob)
    torch.testing.assert_close((loss, vector, grad), (*clean, clean_grad), rtol=0, atol=0)
    assert not grad[dead].any() and clean_grad.any()


def test_mismatched_tokens_have_no_gradient_even_when_infinite():
    logprob = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    old = torch.tensor([-1.0, -torch.inf, -3.0])
    loss, _ = grpo_loss(logprob, torch.ones(1), torch.tensor([0, 3]), old_logprob=old, mismatch_mask=torch.tensor([True, False, True]))
    assert torch.autograd.grad(loss, logprob)[0].tolist() == [-1.0, 0.0, -1.0]


def test_pre_clip_has_no_gradient_outside():
    logprob = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    old = torch.tensor([-1.05, -3.0, 1.0])
    loss, vector = grpo_loss(logprob, torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0, 1, 2, 3]), old_logprob=old, pre_clip=1.0)
    grad = torch.autograd.grad(loss, logprob)[0]
    assert grad[0] != 0 and grad[1:].tolist() == [0.0, 0.0]
    assert vector[STATS.index("pre_clipped")] == 2


def test_a_watched_entropy_costs_no_gradient():
    """With a coefficient of 0 the entropy is a statistic: autograd never visits it."""
    logprob, entropy = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    loss, vector = grpo_loss(logprob, torch.ones(1), torch.tensor([0, 3]), entropy=entropy)
    assert torch.autograd.grad(loss, entropy, allow_unused=True) == (None,) and vector[STATS.index("entropy")] == 3


def test_first_update_is_the_policy_gradient():
    """Without old log-probs the ratio is 1 and the gradient -A, as with old = the policy's own."""
    logprob = torch.randn(13, requires_grad=True)
    advantage, bounds = torch.randn(6), torch.tensor([0, *itertools.accumulate(LENGTHS)])
    none = grpo_loss(logprob, advantage, bounds, denominator=13)
    own = grpo_loss(logprob, advantage, bounds, denominator=13, old_logprob=logprob.detach())
    torch.testing.assert_close(none, own)
    expected = -advantage.repeat_interleave(torch.tensor(LENGTHS)) / 13
    torch.testing.assert_close(torch.autograd.grad(none[0], logprob)[0], expected)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_any_cut_into_micro_batches_adds_up(aggregate, ratio):
    """One row, one response a row, ragged rows: the same loss, gradient and statistics."""
    choice = {name: values[-1] for name, values in CHOICES.items()} | {"variant": "ppo", "aggregate": aggregate, "ratio": ratio, "advantage": "B",
                                                                      "mismatch": "B"}
    logprob, advantage, bounds, options = scene(choice, 2)
    logprob.requires_grad_()
    results = []
    for cut in ([0, 6], [0, 1, 2, 3, 4, 5, 6], [0, 2, 3, 6]):
        loss, total = 0.0, stats.empty()
        for first, last in itertools.pairwise(cut):
            rows = slice(int(bounds[first]), int(bounds[last]))
            part = {k: v[rows] if isinstance(v, torch.Tensor) and len(v) == 13 else v for k, v in options.items()}
            part["mismatch_mask"] = options["mismatch_mask"][first:last]
            piece, vector = grpo_loss(logprob[rows], advantage[first:last], bounds[first:last + 1] - bounds[first], **part)
            loss, total = loss + piece, stats.merge(total, vector)
        results.append((loss, torch.autograd.grad(loss, logprob)[0], total))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-6)


def test_no_tokens_at_all():
    loss, vector = grpo_loss(torch.zeros(0, requires_grad=True), torch.zeros(2), torch.tensor([0, 0, 0]), aggregate="sequence", ratio="sequence")
    loss.backward()
    assert loss == 0 and not vector.any()
    assert grpo_loss(torch.zeros(0), torch.zeros(0), torch.tensor([0]))[0] == 0


def test_statistics_layout():
    assert len(STATS) == len(set(STATS)) and STATS[SUMS:] == ("ratio_max", "rollout_diff_max")
    a, b = torch.arange(len(STATS)).float(), torch.ones(len(STATS))
    merged = stats.merge(a, b)
    assert torch.equal(merged[:SUMS], a[:SUMS] + 1) and torch.equal(merged[SUMS:], a[SUMS:])
    assert torch.equal(stats.merge(stats.empty(), a), a)
