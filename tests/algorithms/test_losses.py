"""Losses of packed rows: global counts, any cut into micro-batches, metrics from combined statistics."""
from __future__ import annotations

import itertools
import math

import pytest
import torch
from sophiavl_fast.kernels import STATS, grpo_loss, stats

from sophiavl_fast.algorithms import losses
from sophiavl_fast.config import Config
from sophiavl_fast.types import Batch


def row(lengths, seed=0, *, old=True, ref=True) -> Batch:
    """A packed row with random contents where the losses look, and nothing elsewhere."""
    g = torch.Generator().manual_seed(seed)
    T, nothing = sum(lengths), torch.zeros(0, dtype=torch.int64)
    randn = lambda: -torch.randn(T, generator=g).abs()
    return Batch(tokens=nothing, position_ids=nothing[None], group_start=nothing, prompt_len=nothing, group_of=nothing, response_start=nothing,
                 cu_seqlens=torch.tensor([0, *lengths]).cumsum(0), predictor=nothing, target=torch.zeros(T, dtype=torch.int64), pixel_values=None,
                 image_grid_thw=None, rollout_logprob=randn(), weight_version=nothing, advantage=torch.randn(len(lengths), generator=g), row_of=nothing,
                 old_logprob=randn() if old else None, ref_logprob=randn() if ref else None)


def conf(**algorithm) -> Config:
    return Config.model_validate({"algorithm": algorithm, "rollout": {"max_new_tokens": 12}})


def take(batch: Batch, first: int, last: int) -> Batch:
    """Responses first..last of a row, as a row of their own."""
    rows = slice(int(batch.cu_seqlens[first]), int(batch.cu_seqlens[last]))
    part = row([0])
    part.cu_seqlens = batch.cu_seqlens[first:last + 1] - batch.cu_seqlens[first]
    part.advantage, part.target = batch.advantage[first:last], batch.target[rows]
    part.rollout_logprob, part.old_logprob, part.ref_logprob = batch.rollout_logprob[rows], batch.old_logprob[rows], batch.ref_logprob[rows]
    return part


def test_denominators_are_counts():
    batches = [row([3, 5]), row([2])]
    assert losses.denominator(batches, conf()) == 10
    assert losses.denominator(batches, conf(aggregate="sequence")) == losses.denominator(batches, conf(aggregate="constant")) == 3
    assert losses.token_count(batches) == 10


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
@pytest.mark.parametrize("cut", [[0, 5], [0, 1, 2, 3, 4, 5], [0, 2, 5]])
def test_micro_batches_and_replicas_give_the_same_gradient(aggregate, cut):
    """The mean over the whole update by its definition, however the five responses are cut."""
    config, whole = conf(aggregate=aggregate, dual_clip=3.0, entropy_coef=0.01), row([4, 1, 7, 3, 6])
    logprob = (whole.old_logprob + 0.1 * torch.randn(21, generator=torch.Generator().manual_seed(4))).requires_grad_()
    entropy = torch.rand(21)
    parts = [take(whole, a, b) for a, b in itertools.pairwise(cut)]
    count = sum(losses.denominator([p], config) for p in parts)
    loss_fn, total, vector = losses.make_grpo_loss(config, count), 0.0, stats.empty()
    for part, a, b in zip(parts, cut, cut[1:]):
        rows = slice(int(whole.cu_seqlens[a]), int(whole.cu_seqlens[b]))
        loss, found = loss_fn(part, logprob[rows], entropy[rows])
        total, vector = total + loss, stats.merge(vector, found)
    single = [grpo_loss(logprob[rows], whole.advantage[i:i + 1], torch.tensor([0, rows.stop - rows.start]), old_logprob=whole.old_logprob[rows],
                        ref_logprob=whole.ref_logprob[rows], kl_coef=0.04, dual_clip=3.0, pre_clip=10.0, entropy=entropy[rows], entropy_coef=0.01)[0]
              for i in range(5) for rows in [slice(int(whole.cu_seqlens[i]), int(whole.cu_seqlens[i + 1]))]]
    by_hand = {"token": sum(single) / 21, "sequence": sum(s / n for s, n in zip(single, [4, 1, 7, 3, 6])) / 5, "constant": sum(single) / (5 * 12)}[aggregate]
    torch.testing.assert_close(total, by_hand)
    torch.testing.assert_close(torch.autograd.grad(total, logprob)[0], torch.autograd.grad(by_hand, logprob)[0])
    assert losses.metrics(vector, config)["loss"] == pytest.approx(by_hand.item(), rel=1e-5)


def test_metrics_are_means_and_maxima_over_everything():
    config, batches = conf(kl_coef=0.1), [row([3, 4], 1), row([5], 2)]
    logprobs = [(b.old_logprob + 0.3).requires_grad_() for b in batches]
    loss_fn, vector = losses.make_grpo_loss(config, losses.denominator(batches, config)), stats.empty()
    for batch, logprob in zip(batches, logprobs):
        vector = stats.merge(vector, loss_fn(batch, logprob, torch.full_like(logprob, 1.5))[1])
    got = losses.metrics(vector, config)
    diff = torch.cat([(b.old_logprob - b.rollout_logprob).abs() for b in batches])
    assert got["rollout/logprob_diff_mean"] == pytest.approx(diff.mean().item(), rel=1e-5)
    assert got["rollout/logprob_diff_max"] == pytest.approx(diff.max().item())
    d = torch.cat([b.ref_logprob - p for b, p in zip(batches, logprobs)])
    assert got["policy/kl_ref"] == pytest.approx((d.exp() - d - 1).mean().item(), rel=1e-4)
    assert got["policy/entropy"] == pytest.approx(1.5)
    positive = torch.cat([b.advantage.repeat_interleave(b.cu_seqlens.diff()) for b in batches]) > 0
    assert got["policy/clip_frac"] == pytest.approx(positive.float().mean().item())  # exp(0.3) = 1.35 is above 1.2 everywhere


def test_the_first_update_compares_the_engine_with_the_policy_itself():
    batch, config = row([6], old=False), conf(kl_coef=0.0)
    logprob = torch.randn(6)
    got = losses.metrics(losses.make_grpo_loss(config, 6)(batch, logprob, None)[1], config)
    assert got["rollout/logprob_diff_max"] == pytest.approx((logprob - batch.rollout_logprob).abs().max().item())
    assert got["policy/clip_frac"] == 0 and got["policy/ratio_mean"] == 1 and math.isnan(got["policy/kl_ref"])


def test_a_reference_is_needed_where_the_kl_counts():
    with pytest.raises(ValueError, match="ref_logprob = None"):
        losses.make_grpo_loss(conf(kl_coef=0.04), 6)(row([6], ref=False), torch.zeros(6), None)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.25, 0.75, 1.0]])
def test_sft_is_the_weighted_mean_negative_log_likelihood(weights):
    batches = [row([3, 4], 1), row([5], 2)]
    batches[0].advantage, batches[1].advantage = torch.tensor(weights[:2]), torch.tensor(weights[2:])
    draw = torch.Generator().manual_seed(0)
    logprobs = [(-torch.rand(n, generator=draw) - 0.1).requires_grad_() for n in (7, 5)]
    loss_fn, vector = losses.sft_loss(losses.weight_of_tokens(batches)), stats.empty()
    total = 0.0
    for batch, logprob in zip(batches, logprobs):
        loss, found = loss_fn(batch, logprob, None)
        total, vector = total + loss, stats.merge(vector, found)
    each = torch.tensor([weights[0]] * 3 + [weights[1]] * 4 + [weights[2]] * 5)
    want = -(each * torch.cat(logprobs)).sum() / each.sum()
    torch.testing.assert_close(total, want)
    assert len(vector) == len(STATS) and losses.sft_metrics(vector) == {"loss": pytest.approx(want.item()), "train/tokens": 12}
    assert torch.autograd.grad(total, logprobs)[0].tolist() == pytest.approx((-each / each.sum())[:7].tolist())
    assert losses.weight_of_tokens([]) == 0


def test_responses_whose_engine_disagrees_are_left_out():
    """mismatch_cap: the geometric-mean ratio a token decides, a response as a whole; the denominator stays."""
    config, batch = conf(mismatch_cap=1.5, kl_coef=0.0, pre_clip=None), row([4, 3, 2], ref=False)
    batch.rollout_logprob = batch.old_logprob.clone()
    batch.rollout_logprob[0:4] += torch.tensor([1.0, -1.0, 1.0, -1.0])   # noise around the policy's own: stays
    batch.rollout_logprob[4:7] -= math.log(1.6)                          # a ratio of 1.6 a token: goes
    logprob = batch.old_logprob.clone().requires_grad_()
    loss, vector = losses.make_grpo_loss(config, 9.0)(batch, logprob)
    (grad,) = torch.autograd.grad(loss, logprob)
    expected = -batch.advantage.repeat_interleave(torch.tensor([4, 3, 2])) / 9
    expected[4:7] = 0
    torch.testing.assert_close(grad, expected)
    assert losses.metrics(vector, config)["policy/mismatch_frac"] == pytest.approx(3 / 9)


@pytest.mark.parametrize("options", [{"kl_coef": 0.0}, {"kl_coef": 0.04}, {"kl_coef": 0.0, "entropy_coef": 0.01},
                                     {"kl_coef": 0.0, "ratio": "sequence"}], ids=str)
def test_no_gradient_lies_outside_the_active_rows(options):
    config, batch = conf(**options), row([3, 0, 5, 2, 4])
    batch.advantage = torch.tensor([0.0, 1.0, -0.5, 0.0, 2.0])
    logprob = (batch.old_logprob + 0.01 * torch.randn(14)).requires_grad_()
    entropy = torch.rand(14, requires_grad=True)
    losses.make_grpo_loss(config, 14)(batch, logprob, entropy)[0].backward()
    rows = losses.active_rows(batch, config)
    if options["kl_coef"] or "entropy_coef" in options:
        assert rows is None and (logprob.grad[:3].any() or entropy.grad[:3].any())
        return
    assert rows.tolist() == [3, 4, 5, 6, 7, 10, 11, 12, 13]
    assert not logprob.grad[[0, 1, 2, 8, 9]].any() and logprob.grad[rows].any()
    batch.advantage = torch.ones(5)
    assert losses.active_rows(batch, config) is None
