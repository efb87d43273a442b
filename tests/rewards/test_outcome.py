import math

import pytest
import torch

from sophiavl_fast.config import Rewards as RewardsConfig
from sophiavl_fast.errors import UserError
from sophiavl_fast.rewards.outcome import OutcomeScorer
from tests.rewards.helpers import group, wrap


@pytest.fixture(scope="module")
def scorer():
    with OutcomeScorer(RewardsConfig(workers=1)) as found:
        yield found


def test_every_type_in_order(scorer):
    scores = scorer.score([
        group("numerical", "12", ["12", "13"]),
        group("multiple_choice", "B", ["(B)", "A"], options=("A. cat", "B. dog")),
        group("ocr", "a b", ["a b", "a c"]),
        group("free_form", "from 1 to 3", ["from 1 to 3", "no"]),
        group("text", "rising fast", ["rising fast", "falling"])])
    assert scores.outcome.tolist() == pytest.approx([1, 0, 1, 0, 1, math.exp(-0.5), 1, 0, 1, 0])
    assert scores.outcome.dtype == torch.float32 and scores.format_ok.all() and scores.killed == 0 and scores.reasons == {}


def test_the_format_gate():
    texts = [wrap("12"), "12", " " + wrap("12"), "<think>r</think> 12", "<think>r<answer>12</answer>"]
    with OutcomeScorer(RewardsConfig()) as gated, OutcomeScorer(RewardsConfig(format_gate=False)) as free:
        assert gated.score([group("numerical", "12", texts, raw=True)]).outcome.tolist() == [1, 0, 1, 0, 0]
        open_ = free.score([group("numerical", "12", texts, raw=True)])
    assert open_.outcome.tolist() == [1, 0, 1, 1, 1] and open_.format_ok.tolist() == [True, False, True, False, False]


def test_with_neg_wer_a_broken_format_is_not_the_best_answer():
    with OutcomeScorer(RewardsConfig(ocr="neg_wer")) as scorer:
        scores = scorer.score([group("ocr", "a b", [wrap("a c"), wrap(""), "a b", wrap("a b")], raw=True)])
    assert scores.outcome.tolist() == pytest.approx([-0.5, -1, -1, 0])


def test_a_killed_grade_is_counted_named_and_asked_once():
    with OutcomeScorer(RewardsConfig(workers=1, timeout_s=3)) as scorer:
        scores = scorer.score([group("numerical", "12", ["12", *["10^{10^{10^{10}}}"] * 6, "x=12"])])
    assert scores.outcome.tolist() == [1, 0, 0, 0, 0, 0, 0, 1]
    assert scores.killed == 6 and set(scores.reasons) == set(range(1, 7)) and scores.seconds < 60


def test_unknown_type(scorer):
    with pytest.raises(UserError, match="problem_type 'numercal' has no grader; did you mean 'numerical'"):
        scorer.score([group("numercal", "12", ["12"])])
