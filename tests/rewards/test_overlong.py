"""The soft overlong penalty against DAPO's equation 13, and what it may and may not change."""
import math

import pytest
import torch

from sophiavl_fast.algorithms import trust
from sophiavl_fast.config import build
from sophiavl_fast.config_checks import check
from sophiavl_fast.errors import UserError
from sophiavl_fast.rewards.overlong import overlong, penalty
from sophiavl_fast.types import Group, Prompt, Response, Scores


def equation(length: int, longest: int, cache: int) -> float:
    if length <= longest - cache:
        return 0.0
    return ((longest - cache) - length) / cache if length <= longest else -1.0


@pytest.mark.parametrize("longest,cache", [(20480, 4096), (56, 16), (7, 7), (10, 1)])
def test_equation_13(longest, cache):
    lengths = [*range(0, 2 * longest, max(1, longest // 97)), longest - cache, longest - cache + 1, longest - 1, longest, longest + 1]
    assert penalty(torch.tensor(lengths), longest, cache).tolist() == pytest.approx([equation(n, longest, cache) for n in lengths], abs=1e-7)


def test_lengths_are_those_of_the_responses_in_order():
    def group(*lengths):
        responses = [Response(token_ids=[5] * n, logprobs=[-1.0] * n, text="", finish_reason="stop", seed=0, weight_versions=[0] * n) for n in lengths]
        return Group(prompt=Prompt(id="a", dataset="d", problem_type="numerical", question="", gold=""), responses=responses)

    config = build({"rollout": {"max_new_tokens": 10}, "rewards": {"overlong_cache": 4}})
    assert overlong([group(6, 8), group(10, 1)], config).tolist() == [0.0, -0.5, -1.0, 0.0]
    config.rewards.overlong_max = 8
    assert overlong([group(6, 8), group(10, 1)], config).tolist() == [-0.5, -1.0, -1.0, 0.0]
    config.rewards.overlong_cache = 0
    assert overlong([group(6)], config) is None


def scores(outcome, thinking, late) -> Scores:
    given = None if thinking is None else torch.tensor(thinking)
    return Scores(outcome=torch.tensor(outcome), format_ok=torch.ones(len(outcome), dtype=torch.bool), thinking=given,
                  overlong=None if late is None else torch.tensor(late))


@pytest.mark.parametrize("normalize", ["std", "mean", "batch"])
@pytest.mark.parametrize("mode", ["paper", "repo", "variance", "off"])
def test_it_adds_to_the_reward_and_leaves_gamma_alone(mode, normalize):
    """A right answer that came late stays right: gamma and the thinking term are those without the penalty."""
    config = build({"trust": {"mode": mode}, "algorithm": {"normalize": normalize}, "run": {"steps": 10}})
    outcome, thinking, late = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0], [0.2, 0.9, 0.4, 0.6, 0.9, 0.3], [0.0, -1.0, -0.75, 0.0, -1.0, 0.0]
    if mode == "variance":
        thinking = [[t, t / 2] for t in thinking]
    plain, _ = trust.advantages(scores(outcome, thinking, None), [4, 2], 3, config)
    found, metrics = trust.advantages(scores(outcome, thinking, late), [4, 2], 3, config)
    torch.testing.assert_close(found.reward, plain.reward + torch.tensor(late))
    assert torch.equal(found.gamma.nan_to_num(7), plain.gamma.nan_to_num(7)) and torch.equal(found.used, plain.used)
    parts = [slice(0, 6)] if normalize == "batch" else [slice(0, 4), slice(4, 6)]
    for rows in parts:
        r = found.reward[rows]
        wanted = r - r.mean() if normalize == "mean" else (r - r.mean()) / (r.std() + 1e-6)
        torch.testing.assert_close(found.advantage[rows], wanted, atol=1e-5, rtol=1e-5)
    assert metrics["reward/overlong"] == pytest.approx(sum(late) / 6) and metrics["reward/outcome"] == pytest.approx(4 / 6)


def test_no_late_response_changes_nothing():
    config = build({"run": {"steps": 10}})
    outcome, thinking = [1.0, 0.0, 1.0, 0.0], [0.2, 0.9, math.nan, 0.6]
    plain, before = trust.advantages(scores(outcome, thinking, None), [2, 2], 0, config)
    found, after = trust.advantages(scores(outcome, thinking, [0.0] * 4), [2, 2], 0, config)
    torch.testing.assert_close(found.advantage, plain.advantage)
    assert after.pop("reward/overlong") == 0 and "reward/overlong" not in before


def test_equal_outcomes_of_different_lengths_are_not_uniform():
    """trust.uniform_groups: skip leaves out groups that only the judge tells apart; here the length does. The metric is of outcomes alone."""
    config = build({"trust": {"uniform_groups": "skip"}, "run": {"steps": 10}})
    found, metrics = trust.advantages(scores([1.0] * 4, [0.5, 0.4, 0.3, 0.2], [0.0, 0.0, -1.0, 0.0]), [4], 0, config)
    assert found.advantage[2] < 0 < found.advantage[0] and metrics["trust/uniform_share"] == pytest.approx(1)


@pytest.mark.parametrize("cache,longest", [(-1, None), (57, None), (8, 7), (8, 57)])
def test_bad_lengths_are_refused(cache, longest):
    config = build({"model": {"path": "m"}, "data": {"train": "d"}, "rollout": {"max_new_tokens": 56},
                    "rewards": {"overlong_cache": cache, "overlong_max": longest}})
    with pytest.raises(UserError, match=f"rewards.overlong_cache = {cache}, rewards.overlong_max"):
        check(config)
