"""The public SophiaVL-R1 code's known faults in its algorithm, one test each: this project does not have them.

Numbers 1 to 4 are those of the list that compares the paper with the code (kxfan2002/SophiaVL-R1 at a818494); trust.mode: repo
reproduces its arithmetic on purpose, and is compared with it here by hand.
"""
from __future__ import annotations

import math

import pytest
import torch

from sophiavl_fast.algorithms import trust
from sophiavl_fast.config import Config
from sophiavl_fast.types import Scores


def run(outcome, thinking, *, step=0, **sections):
    scores = Scores(outcome=torch.tensor(outcome), format_ok=torch.ones(len(outcome), dtype=torch.bool), thinking=torch.tensor(thinking))
    return trust.advantages(scores, [len(outcome)], step, Config.model_validate(sections))


def test_bug_1_trust_acts_on_tasks_scored_0_or_1():
    """There wrong responses are never shown to the judge and count as 0, so that their side never looks better."""
    outcome, thinking = [1.0, 1.0, 0.0, 0.0], [0.2, 0.4, 0.9, 0.9]
    ours, _ = run(outcome, thinking)
    torch.testing.assert_close(ours.gamma, torch.full((4,), math.exp(0.3 - 0.9)))
    assert ours.reward[2] == pytest.approx(0.3 * math.exp(-0.6) * 0.9)
    theirs, _ = run(outcome, thinking, trust={"mode": "repo"})
    assert (theirs.gamma == 1).all() and theirs.reward[2:].tolist() == [0.0, 0.0]


def test_bug_2_the_logged_gamma_is_the_applied_one():
    """There the log shows exp(2 (right - wrong)) where the reward has exp(right - wrong)."""
    for mode in ("paper", "repo"):
        outcome, thinking = [1.0, 0.3], [0.2, 0.7]
        got, metrics = run(outcome, thinking, trust={"mode": mode})
        assert metrics["trust/gamma"] == pytest.approx(math.exp(-0.5))
        applied = (got.reward - torch.tensor(outcome)) / (metrics["trust/weight"] * torch.tensor(thinking))
        torch.testing.assert_close(applied, got.gamma)


def test_bug_2_no_gamma_is_made_up_where_none_was_applied():
    """There groups all right or all wrong are logged with 0.5."""
    got, metrics = run([1.0, 1.0], [0.2, 0.7], trust={"mode": "repo"})
    assert got.gamma.isnan().all() and math.isnan(metrics["trust/gamma"]) and not got.used.any()


@pytest.mark.parametrize("outcome", [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
def test_bug_3_groups_all_right_or_all_wrong_keep_their_thinking_reward(outcome):
    """Sound and unsound ways to the same answer differ in advantage; there the whole group has none."""
    thinking = [0.9, 0.5, 0.1]
    ours, _ = run(outcome, thinking)
    assert ours.advantage[0] > 0 > ours.advantage[2]
    assert not run(outcome, thinking, trust={"mode": "repo"})[0].advantage.any()
    assert not run(outcome, thinking, trust={"uniform_groups": "skip"})[0].advantage.any()


def test_bug_4_annealing_spans_the_run_and_alpha_is_a_setting():
    """There T is 12,000 through a misnamed key while a run has 1,500 steps: the weight ends at 0.265 instead of 0.110."""
    weight = lambda **trust_section: run([1.0], [0.5], step=1500, run={"steps": 1500}, trust=trust_section)[1]["trust/weight"]
    assert weight() == pytest.approx(0.110, abs=5e-4)
    assert weight(anneal_steps=12000) == pytest.approx(0.265, abs=5e-4)
    assert weight(alpha=0.6) == pytest.approx(0.221, abs=5e-4)


def test_repo_mode_is_the_public_arithmetic():
    """Partial scores, by hand: 0.1 is not asked and counts as 0 on the wrong side; 0.3 is asked and wrong."""
    got, _ = run([0.8, 0.6, 0.3, 0.1], [0.1, 0.2, 0.9, 1.0], trust={"mode": "repo", "alpha": 0.3}, run={"steps": 500}, step=100)
    weight = 0.3 * math.exp(-0.2) * math.exp(0.15 - 0.45)
    torch.testing.assert_close(got.reward, torch.tensor([0.8 + weight * 0.1, 0.6 + weight * 0.2, 0.3 + weight * 0.9, 0.1]))
    nobody_right, _ = run([0.4, 0.3], [0.9, 0.8], trust={"mode": "repo"})
    assert (nobody_right.gamma == 1).all()
    torch.testing.assert_close(nobody_right.reward, torch.tensor([0.4 + 0.27, 0.3 + 0.24]))


def test_a_failed_judge_is_not_a_bad_mark():
    """There a score that could not be had is 0, which punishes the response; here its group does without."""
    got, metrics = run([1.0, 1.0, 0.0], [0.8, math.nan, 0.3])
    assert got.reward.tolist() == [1.0, 1.0, 0.0] and got.advantage[0] == got.advantage[1] and metrics["reward/unscored"] == pytest.approx(1 / 3)
