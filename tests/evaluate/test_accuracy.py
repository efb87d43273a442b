"""What an evaluation reports where a rule for reasoning is there, and where there is none."""
import io
import math

from rich.console import Console

from sophiavl_fast.evaluate.accuracy import Judgement, metrics
from sophiavl_fast.monitor.summary import print_eval


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
