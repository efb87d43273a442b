import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sophiavl_fast.rewards.format import parse

# the public code's full match (methods.md 1.2), with leading white space tolerated
REFERENCE = re.compile(r"\s*<think>(.*?)</think>.*<answer>(.*?)</answer>.*", re.DOTALL)
PIECES = st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "a", " ", "\n", "<", "answer>", "7"]), max_size=12).map("".join)


@given(PIECES)
def test_the_gate_is_the_public_full_match(text):
    assert parse(text).ok == bool(REFERENCE.fullmatch(text))


@given(PIECES, PIECES)
def test_parts_of_a_well_formed_response(reasoning, answer):
    found = parse(f"<think>{reasoning}</think>\n<answer>{answer}</answer>")
    assert found.ok
    if "</think>" not in reasoning:
        assert found.reasoning == reasoning.strip()
        assert found.answer == answer.partition("</answer>")[0].strip()


@pytest.mark.parametrize("text,ok,reasoning,answer", [
    ("<think>r</think><answer>7</answer>", True, "r", "7"),
    (" \n<think>r</think> so <answer>7</answer> done", True, "r", "7"),
    ("<think>maybe <answer>3</answer>?</think><answer>7</answer>", True, "maybe <answer>3</answer>?", "7"),
    ("<think>r</think><answer>7</answer><answer>8</answer>", True, "r", "7"),
    ("Sure! <think>r</think><answer>7</answer>", False, "Sure! <think>r", "7"),
    ("<think>cut off", False, "cut off", ""),
    ("<think>r</think> 7", False, "r", "7"),
    ("<think>r <answer>7</answer>", False, "r", "7"),
    ("<think>r</think><answer>7", False, "r", "<answer>7"),
    ("", False, "", ""),
])
def test_cases(text, ok, reasoning, answer):
    found = parse(text)
    assert (found.ok, found.reasoning, found.answer) == (ok, reasoning, answer)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", ["<think>", "</think>", "<answer>", "</answer><answer>", "<think></think><answer>", "<", " ", "a"])
def test_a_megabyte_of_tags_is_read_in_linear_time(piece):
    for _ in range(20):
        parse("<think>" + piece * (1_000_000 // len(piece)))
