"""Scores to advantages under the configuration, and the metrics that say what trust did."""
from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from sophiavl_fast.algorithms import trust
from sophiavl_fast.config import Config
from sophiavl_fast.types import Scores

NAN = math.nan


def conf(**sections) -> Config:
    return Config.model_validate(sections)


def scores(outcome, thinking=None) -> Scores:
    return Scores(outcome=torch.tensor(outcome), format_ok=torch.ones(len(outcome), dtype=torch.bool),
                  thinking=None if thinking is None else torch.tensor(thinking))


def test_annealing_goes_from_one_to_exp_minus_one():
    config = conf(run={"steps": 1500})
    assert trust.anneal_factor(0, config) == 1
    assert trust.anneal_factor(1500, config) == pytest.approx(0.36788, abs=1e-5)
    linear = conf(run={"steps": 1500}, trust={"anneal": "linear"})
    assert trust.anneal_factor(750, linear) == pytest.approx((1 + math.exp(-1)) / 2)
    assert trust.anneal_factor(1500, linear) == trust.anneal_factor(9000, linear) == pytest.approx(math.exp(-1))
    assert trust.anneal_factor(700, conf(trust={"anneal": "none"})) == 1
    assert trust.anneal_factor(500, conf(run={"steps": 1500}, trust={"anneal_steps": 500})) == pytest.approx(math.exp(-1))


def test_reward_is_the_formula_of_its_scores():
    """Every quantity of two groups, recomputed from the scores; step 10 of 20."""
    config = conf(run={"steps": 20})
    outcome, thinking = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0], [0.2, 0.9, 0.7, 0.9, 0.6, 0.1]
    got, metrics = trust.advantages(scores(outcome, thinking), [3, 3], 10, config)
    gamma, weight = math.exp(0.2 - 0.8), 0.3 * math.exp(-0.5)
    torch.testing.assert_close(got.gamma, torch.tensor([gamma] * 3 + [1.0] * 3))
    torch.testing.assert_close(got.reward, torch.tensor(outcome) + weight * got.gamma * torch.tensor(thinking))
    for rows in (slice(0, 3), slice(3, 6)):
        r = got.reward[rows]
        torch.testing.assert_close(got.advantage[rows], (r - r.mean()) / (r.std() + 1e-6))
    assert metrics["trust/weight"] == pytest.approx(weight) and metrics["trust/gamma"] == pytest.approx((gamma + 1) / 2)
    assert metrics["reward/total"] == pytest.approx(got.reward.mean().item()) and metrics["reward/outcome"] == pytest.approx(0.5)
    assert metrics["reward/thinking"] == pytest.approx(sum(thinking) / 6) and metrics["reward/unscored"] == 0


@pytest.mark.parametrize("sections", [{"algorithm": {"name": "grpo"}}, {"algorithm": {"name": "grpo"}, "trust": {"mode": "repo"}}, {}])
def test_without_thinking_it_is_grpo_to_the_bit(sections):
    """algorithm.name: grpo ignores the thinking scores, and a rewards room without a judge gives none."""
    outcome = torch.randint(0, 2, (24,), generator=torch.Generator().manual_seed(1)).float()
    thinking = None if not sections else torch.rand(24).tolist()
    got, metrics = trust.advantages(scores(outcome.tolist(), thinking), [8, 8, 8], 3, conf(**sections))
    groups = outcome.double().reshape(3, 8)
    plain = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
    assert torch.equal(got.advantage, plain.flatten().float()) and torch.equal(got.reward, outcome)
    assert not got.used.any() and math.isnan(metrics["trust/gamma"]) and math.isnan(metrics["reward/thinking"])
    assert metrics["reward/unscored"] == 0


def test_unscored_are_counted_and_drop_their_group():
    got, metrics = trust.advantages(scores([1.0, 0.0, 1.0, 0.0], [0.5, NAN, 0.2, 0.9]), [2, 2], 0, Config())
    assert got.used.tolist() == [False, False, True, True] and metrics["reward/unscored"] == 0.25
    assert metrics["trust/gamma"] == pytest.approx(math.exp(-0.7))
    assert metrics["reward/thinking"] == pytest.approx((0.5 + 0.2 + 0.9) / 3)


def test_gamma_is_averaged_over_groups_that_compare_two_sides():
    """A group all right or all wrong has gamma 1 by definition and says nothing about the judge."""
    _, metrics = trust.advantages(scores([1.0, 1.0, 0.0, 0.0, 1.0, 0.0], [0.5, 0.9, 0.2, 0.3, 0.1, 0.6]), [2, 2, 2], 0, Config())
    assert metrics["trust/gamma"] == pytest.approx(math.exp(-0.5))
    _, none = trust.advantages(scores([1.0, 1.0], [0.5, 0.9]), [2], 0, Config())
    assert math.isnan(none["trust/gamma"])
    _, half = trust.advantages(scores([1.0, 0.0, 0.0], [NAN, 0.9, 0.1]), [3], 0, conf(thinking={"quorum": 0.5}))
    assert math.isnan(half["trust/gamma"])


def test_variance_mode_averages_the_responses_gammas():
    thinking = [[0.2, 0.5, 0.8], [0.4, 0.4, 0.4]]
    got, metrics = trust.advantages(scores([1.0, 1.0], thinking), [2], 0, conf(trust={"mode": "variance"}))
    torch.testing.assert_close(got.gamma, torch.tensor([math.exp(-0.06), 1.0]))
    assert metrics["trust/gamma"] == pytest.approx((math.exp(-0.06) + 1) / 2)


@pytest.mark.parametrize(("uniform", "share"), [("score", 0.5), ("skip", 0.0)])
def test_uniform_share(uniform, share):
    """Two groups of two with a spread each: std normalisation gives both the same |advantage|."""
    config = conf(trust={"uniform_groups": uniform})
    _, metrics = trust.advantages(scores([1.0, 1.0, 1.0, 0.0], [0.1, 0.9, 0.5, 0.5]), [2, 2], 0, config)
    assert metrics["trust/uniform_share"] == pytest.approx(share, abs=1e-4)


def test_penalties_make_no_other_outcomes():
    """The share is of groups whose outcomes are equal, whatever the overlong penalty adds to them."""
    late = dataclasses.replace(scores([1.0, 1.0, 1.0, 0.0], [0.5] * 4), overlong=torch.tensor([0.0, -0.5, 0.0, 0.0]))
    _, metrics = trust.advantages(late, [2, 2], 0, conf())
    assert metrics["trust/uniform_share"] == pytest.approx(0.5, abs=1e-4)


def test_centred_uniform_groups_feel_the_annealing():
    config = conf(run={"steps": 10}, trust={"uniform_groups": "center"})
    first, last = (trust.advantages(scores([1.0, 1.0], [0.2, 0.8]), [2], step, config)[0].advantage for step in (0, 10))
    torch.testing.assert_close(last, first * math.exp(-1))
    torch.testing.assert_close(first, torch.tensor([-0.09, 0.09]))


@pytest.mark.parametrize("seed", range(4))
def test_rank_correlation_is_scipys(seed):
    from scipy.stats import spearmanr

    g = torch.Generator().manual_seed(seed)
    outcome = torch.randint(0, 3, (40,), generator=g).float() / 2
    thinking = (torch.rand(40, generator=g) * 10).round() / 10 * 0.75 + 0.25 * outcome
    thinking[::7] = torch.nan
    scores = Scores(outcome=outcome, format_ok=torch.ones(40, dtype=torch.bool), thinking=thinking)
    found = trust.advantages(scores, [8] * 5, 0, Config())[1]["trust/rank_corr"]
    known = ~thinking.isnan()
    assert found == pytest.approx(spearmanr(thinking[known], outcome[known]).statistic)
    scores.outcome = torch.ones(40)
    assert math.isnan(trust.advantages(scores, [8] * 5, 0, Config())[1]["trust/rank_corr"])
    scores.thinking = torch.full((40,), torch.nan)
    assert math.isnan(trust.advantages(scores, [8] * 5, 0, Config())[1]["trust/rank_corr"])
