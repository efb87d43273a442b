"""The rule accepts every sound trace, in any row, and flags every slip and every corrupted line."""
import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sophiavl_fast.data.demo import generate, judge_data, questions, soundness, traces
from tests.data.demo.conftest import asked

kinds = st.sampled_from(sorted(questions.KINDS))
rows_of_digits = st.lists(st.integers(0, 9), min_size=2, max_size=3)
many = settings(max_examples=300, deadline=None)


def record(question):
    return generate.record(question, None, 0)


def check(question, trace):
    return soundness.check(record(question), trace.response)


@many
@given(kinds, rows_of_digits)
def test_sound_traces_are_sound_and_right(kind, digits):
    question = asked(kind, digits)
    trace = traces.sound(question)
    assert check(question, trace) == soundness.Soundness(True, True, 1.0, "")
    assert soundness.exact_match(record(question), trace.answer)


@many
@given(kinds, rows_of_digits)
def test_slips_and_lucky_traces_are_not_sound(kind, digits):
    question = asked(kind, digits)
    slip, lucky = traces.slip(question), traces.lucky(question)
    assume(slip is not None)
    for trace in (slip, lucky):
        found = check(question, trace)
        assert found.format_ok and not found.sound and 0 < found.score < 1 and found.flaw == "step"
    assert soundness.exact_match(record(question), lucky.answer)
    assert soundness.exact_match(record(question), slip.answer) == (slip.flavour == "lucky")


@pytest.mark.parametrize(("kind", "digits", "lines"), [
    ("sum", (8, 5, 4), ["8 5 4", "8+5=3", "3+4=7"]),         # a dropped carry
    ("add", (8, 5, 4), ["8 5 4", "8+5=3", "3+4=7"]),
    ("tens", (8, 5, 4), ["8 5 4", "8+5=3", "3+4=7"]),
    ("largest", (2, 9, 1), ["2 9 1", "max 2"]),              # the first instead of the largest
    ("spread", (3, 9, 4), ["3 9 4", "4-3=1"]),               # only the ends
    ("range", (3, 9, 4), ["3 9 4", "min 3", "max 4"]),
    ("read", (3, 9, 4), ["3 9 4", "2 digits"]),              # a lost last digit
    ("trend", (3, 9, 4), ["3 9 4", "4>3"]),          # walked from the right
])
def test_each_kind_slips_in_its_own_way(kind, digits, lines):
    assert list(traces.slip(asked(kind, digits)).lines) == lines


def test_every_kind_can_slip_and_no_slip_hides_where_it_would_not_show():
    for kind in questions.KINDS:
        assert any(traces.slip(asked(kind, (a, b, c))) for a in range(10) for b in range(10) for c in range(10))
    assert traces.slip(asked("sum", (2, 3))) is None and traces.lucky(asked("sum", (2, 3))) is None


@many
@given(kinds, rows_of_digits, st.data())
def test_one_wrong_digit_anywhere_is_noticed(kind, digits, data):
    question = asked(kind, digits)
    trace = "\n".join(traces.sound(question).lines)
    at = data.draw(st.sampled_from([i for i, c in enumerate(trace) if c.isdigit()]))
    wrong = trace[:at] + data.draw(st.sampled_from([c for c in "0123456789" if c != trace[at]])) + trace[at + 1:]
    found = soundness.check_trace(record(question), wrong)
    assert not found.sound and found.score < 1
    assert (found.flaw == "reading") == (at < trace.index("\n"))


@many
@given(kinds, rows_of_digits, st.integers(0, 1 << 30))
def test_corrupted_traces_are_noticed(kind, digits, seed):
    question = asked(kind, digits)
    for name, corrupt in (judge_data.TRAINED | judge_data.HELD_OUT).items():
        lines = corrupt(question, random.Random(seed))
        if lines == list(traces.sound(question).lines):
            assert name == "astray" and kind in ("read", "largest", "spread", "range", "trend")  # another row may have the same steps
            continue
        assert not soundness.check_trace(record(question), "\n".join(lines)).sound, (name, lines)


def test_flaws_are_named_and_scored_by_share():
    question = record(asked("sum", (8, 5, 4)))
    for trace, score, flaw in [
        ("8 5 4\n8+5=13\n13+4=17", 1.0, ""),
        (" 8  5 4 \n\n5+8=13\n4+13=17\n", 1.0, ""),          # spaces, empty lines and the order of two terms do not matter
        ("8 5 4\n8+5=13\n13+4=18", 2 / 3, "step"),
        ("8 5 4\n8+5=13", 2 / 3, "missing"),
        ("8 5 9\n8+5=13\n13+4=17", 2 / 3, "reading"),
        ("8 5 4\n8+5=13\n8+5=13\n13+4=17", 3 / 4, "redundant"),
        ("8 5 4\n13+4=17\n8+5=13", 2 / 3, "step"),           # the wrong way round
        ("", 0.0, "reading"),
    ]:
        found = soundness.check_trace(question, trace)
        assert (found.score, found.flaw, found.sound) == (pytest.approx(score), flaw, not flaw), trace


@pytest.mark.parametrize("response", [
    "8 5\n8+5=13", "<think>8 5\n8+5=13</think>13", "<answer>13</answer>", "<think>8 5\n8+5=13<answer>13</answer>",
    "so <think>8 5\n8+5=13</think><answer>13</answer>",
])
def test_a_broken_format_is_never_sound(response):
    assert soundness.check(record(asked("sum", (8, 5))), response) == soundness.Soundness(False, False, 0.0, "format")
    assert soundness.answer_of(response) is None


def test_an_unknown_kind_is_loud():
    with pytest.raises(ValueError, match="riddle"):
        soundness.check_trace({"kind": "riddle", "digits": [1, 2]}, "1 2")


@pytest.mark.parametrize(("kind", "digits", "right", "wrong"), [
    ("sum", (8, 5), ["13", " 13 ", "13.0"], ["3", "", "13 or 14", "thirteen", "nan"]),
    ("read", (8, 5), ["8 5", "8  5\n"], ["85", "8", "5 8"]),
    ("range", (8, 5), ["from 5 to 8", "From 5 to 8"], ["5 to 8", "from 8 to 5"]),
    ("trend", (8, 5), ["falling", "Falling"], ["rising", "fall"]),
])
def test_exact_match(kind, digits, right, wrong):
    question = record(asked(kind, digits))
    assert all(soundness.exact_match(question, answer) for answer in right)
    assert not any(soundness.exact_match(question, answer) for answer in wrong)


@many
@given(st.sampled_from(["tens", "largest"]), rows_of_digits)
def test_exact_match_of_options(kind, digits):
    question = asked(kind, digits)
    gold, option = question.answer, question.options["ABC".index(question.answer)]
    for answer in (gold, gold.lower(), f"({gold})", f"{gold}.", option, option[3:]):
        assert soundness.exact_match(record(question), answer)
    for answer in ["", "D", "A, B", *(set("ABC") - {gold})]:
        assert not soundness.exact_match(record(question), answer)
