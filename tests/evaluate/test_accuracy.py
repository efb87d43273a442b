"""What an evaluation reports: with and without a rule for reasoning, of empty answers and of graders that were killed."""
import io
import math

import pytest
from rich.console import Console

from sophiavl_fast.config import Rewards
from sophiavl_fast.evaluate.accuracy import Judgement, judge, metrics
from sophiavl_fast.monitor.summary import print_eval
from tests.rewards.helpers import group


def judgement(kind: str, right: bool, sound: bool | None) -> Judgement:
    return Judgement("d:1", kind, "q", "g", "r", right, sound, 4, False)


def test_shares_as_a_whole_and_by_type():
    found = metrics([judgement("ocr", True, False), judgement("ocr", False, False), judgement("text", True, True), judgement("text", True, None)])
    assert found["eval/accuracy"] == 0.75 and found["eval/accuracy/ocr"] == 0.5 and found["eval/accuracy/text"] == 1
    assert found["eval/reasoning"] == 1 / 3 and found["eval/reasoning/ocr"] == 0 and found["eval/reasoning/text"] == 1


def test_reasoning_without_a_rule_is_not_a_number_and_is_not_shown():
    found = metrics([judgement("ocr", True, None), judgement("ocr", False, None)])
    assert found["eval/accuracy"] == 0.5 and math.isnan(found["eval/reasoning"])
    out = io.StringIO()
    print_eval(found, Console(file=out, width=80))
    assert "accuracy" in out.getvalue() and "reasoning" not in out.getvalue() and "nan" not in out.getvalue()
    assert metrics([]) == {}


@pytest.mark.parametrize("kind,gold,answer,right", [
    ("free_form", "...", "", False), ("free_form", ".", ".", True), ("free_form", "A cat.", "a  cat", True), ("text", ".", "", False),
    ("ocr", "caf\u00e9", "cafe\u0301", True),
    ("numerical", "5", "", False)])
def test_an_empty_answer_is_never_right(kind, gold, answer, right):
    (found,) = judge([group(kind, gold, [answer])], Rewards(workers=1))
    assert found.right is right and not found.killed


def test_killed_graders_are_counted():
    judged = judge([group("numerical", "12", ["12", "10^{10^{10^{10}}}"])], Rewards(workers=1, timeout_s=3))
    found = metrics(judged)
    assert [j.right for j in judged] == [True, False] and found["eval/grader_killed"] == 1 and found["eval/accuracy"] == 0.5
    assert metrics(judged[:1])["eval/grader_killed"] == 0
