import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sophiavl_fast.rewards.thinking.parse import parse_score

TAG = ("<answer>", "</answer>")


@pytest.mark.parametrize("reply,score", [
    ("0.75", 0.75), ("0.85", 0.85), ("0.95", 0.95), ("0.30", 0.3), ("1", 1), ("0", 0), ("1.0", 1), (".5", 0.5), ("**0.6**", 0.6),
    ("$0.6$", 0.6), ("0.123456", 0.123456),
    ("\\boxed{0.7}", 0.7), ("0.8/1", 0.8), ("0.8 out of 1", 0.8), ("0.8.", 0.8), ("Score: 0.4", 0.4), ("The score is 0.4.", 0.4), ("score = **0.4**", 0.4),
    ("1 error; score 0.3", 0.3), ("Rating: 0.4 out of 1.0, since step 2 fails", 0.4), ("Score: 0.4\nScore: 0.4", 0.4),
    ("<answer>0.8</answer>", 0.8), ("<answer> 0.8 </answer>", 0.8), ("0.1 maybe <answer>0.3</answer> or <answer>0.8</answer>", 0.8),
    ("<answer>Score: 0.8</answer>", 0.8),
    ("3 wrong steps, 0.2 lost: <answer>**0.75**</answer>", 0.75)])
def test_scores(reply, score):
    assert parse_score(reply, *TAG) == (score, "")


@pytest.mark.parametrize("reply", [
    "", " ", "good", "7", "-0.2", "1.01", "2/10", "75%", "0,7", "1e-1", "nan", "**2 wrong steps**", "1 wrong step", "there is 1 error",
    "out of 1 is it?", "0.2 or 0.8",
    "Score: 0.4, no, score: 0.6", "a score of 1, but I give 0.4", "score 1 error", "<answer>7</answer>", "<answer></answer>", "0.8 <answer>0.", "<answer>0.8",
    "<answer>two of 3 steps</answer>", "0.5.5", "0.8 0.8", "٠.٥", "version 0.3"])
def test_unsure_is_nan_with_a_reason(reply):
    found = parse_score(reply, *TAG)
    assert math.isnan(found.value) and found.reason.startswith("judge's reply: ") and "\n" not in found.reason


@given(st.floats(0, 1).map(lambda x: f"{x:.{4}f}"))
def test_any_decimals(text):
    for reply in (text, f"<answer>{text}</answer>", f"Score: {text}"):
        assert parse_score(reply, *TAG).value == float(text)


@given(st.text(alphabet="01.27/ scorewng<answer>:\n", max_size=60))
def test_a_score_lies_in_the_unit_interval_and_its_digits_in_the_reply(reply):
    found = parse_score(reply, *TAG)
    assert math.isnan(found.value) == bool(found.reason)
    if not found.reason:
        assert 0 <= found.value <= 1 and any(c in reply for c in "01")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", ["<answer>", "score ", "score: 0.", "1", "0.1 ", "*", " ", "\\boxed{"])
def test_a_megabyte_is_read_at_once(piece):
    parse_score(piece * (1_000_000 // len(piece)), *TAG)
