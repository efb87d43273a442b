"""Multiple-choice answers as models write them: everyday formats, and hedges and contradictions that must earn nothing."""
import time

import pytest

from sophiavl_fast.rewards.graders import quick
from sophiavl_fast.rewards.graders.task import Task

ANIMALS = ("A. cat", "B. dog", "C. A bird", "D. bed")
LENGTHS = ("12 cm", "15 cm", "18 cm", "20 cm")
NUMBERS = ("1", "2", "3", "4")
LETTERS = ("A", "B", "C", "D")
ROOTS = ("\\frac{\\sqrt{3}}{2}", "\\frac{3}{2}", "2\\sqrt{3}", "3")


def outcome(answer, gold, options):
    return quick(Task("multiple_choice", answer, gold, options))


@pytest.mark.parametrize("answer", [
    "The answer is **B**", "The answer is **B**.", "Answer: **B. dog**", "**Answer: B**", "\\boxed{\\text{B}}", "$\\boxed{\\mathrm{B}}$", "\\boxed{(B)}",
    "\\(B\\)", "\\[B\\]",
    "B, dog", "B (dog)", "B—dog", "B - dog", "B、dog", "“B”", "'B'", "{B}", "<B>", "【B】", "B!", "It is B", "It's B", "I choose B", "B is correct",
    "B is the correct answer",
    "B is the answer", "(B) is correct", "So the answer is B", "Therefore, the answer is B", "The correct answer is option B", "The answer is B, dog",
    "Answer - B", "Answer=B",
    "答案是B", "答案：B", "选B", "The dog", "a dog", "B. the dog", "B. a small brown dog", "B. dog because it barks",
    "B because it barks", "B. Because it barks"])
def test_everyday_formats(answer):
    assert outcome(answer, "B", ANIMALS) == 1.0


@pytest.mark.parametrize("gold,answer", [
    ("A", "(A) or (B)"), ("A", "A) or B) or C)"), ("A", "A: no, B: yes"), ("B", "(B) or (C)"), ("B", "(B) is wrong, so (C)"), ("B", "B. dog, C. A bird"),
    ("B", "(B)(C)"), ("B", "B.C"),
    ("B", "(B)/(C)"), ("B", "B. is incorrect"), ("B", "B is not correct"), ("B", "B is incorrect"), ("B", "B: the cat"), ("B", "B. bird"),
    ("B", "B. none of these"), ("B", "B: cat or dog"),
    ("B", "(B) cat and dog"), ("B", "B) bed, not dog"), ("B", "(B)?"), ("B", "A or B is correct"), ("B", "Neither A nor B"), ("B", "B, cat"),
    ("B", "B (cat)"), ("B", "B. small cat")])
def test_hedges_and_contradictions(gold, answer):
    assert outcome(answer, gold, ANIMALS) == 0.0


@pytest.mark.parametrize("answer,gold,options,right", [
    ("B. 15", "B", LENGTHS, 1), ("15", "B", LENGTHS, 1), ("B. 18", "B", LENGTHS, 0), ("B. 18 cm", "B", LENGTHS, 0), ("B: 18", "B", LENGTHS, 0),
    ("15 m", "B", LENGTHS, 0),
    ("A. 1, C. 3", "AC", NUMBERS, 1), ("(A) 1, (C) 3", "AC", NUMBERS, 1), ("A. 1 and C. 3", "AC", NUMBERS, 1), ("A. 1, C. 3", "A", NUMBERS, 0),
    ("(A) 1, (C) 3", "A", NUMBERS, 0),
    ("A. 1, C. 4", "AC", NUMBERS, 0), ("A, C", "A. 1, C. 3", NUMBERS, 1), ("(A)(C)", "AC", NUMBERS, 1), ("A+C", "AC", NUMBERS, 1),
    ("Both A and C", "AC", NUMBERS, 1),
    ("Option A and Option C", "AC", NUMBERS, 1), ("A. 1 or 3", "A", NUMBERS, 0),
    ("B. dog", "B", LETTERS, 1), ("B. dog, C. cat", "BC", LETTERS, 1), ("B. dog, C. cat", "B", LETTERS, 0), ("B. is wrong", "B", LETTERS, 0),
    ("(B) or (C)", "B", LETTERS, 0),
    ("A. √3/2", "A", ROOTS, 1), ("A. 3/2", "A", ROOTS, 0), ("C. 2√3", "C", ROOTS, 1), ("B. 1.5", "B", ROOTS, 1), ("A. 1.5", "A", ROOTS, 0),
    ("A. No", "A", ("No", "Yes"), 1), ("A. Yes", "A", ("No", "Yes"), 0), ("A. No, because it is not", "A", ("No", "Yes"), 1),
    ("A. black", "A", ("black cat", "white cat"), 1), ("A. cat", "A", ("black cat", "white cat"), 1), ("A. white", "A", ("black cat", "white cat"), 0),
    ("A bird (C)", "C", ANIMALS, 1), ("A. A and B", "A", ("A and B", "B and C"), 1), ("A. A and B", "A and B", ("A and B", "B and C"), 1),
    ("Answer: A and B", "A and B", ("A and B", "B and C"), 1), ("A - A", "A", LETTERS, 1), ("A - B", "A", LETTERS, 0),
    ("B -1/2", "B", ("1/2", "-1/2"), 1), ("B -1/2", "A", ("1/2", "-1/2"), 0), ("B-dog", "B", ANIMALS, 1),
    ("It is raining", "B", ("sun", "It is raining"), 1), ("George W. Bush", "B", ("Al Gore", "George W. Bush"), 1),
    ("B. George W. Bush", "B", ("Al Gore", "George W. Bush"), 1),
    ("B. 一只狗", "B", ("猫", "狗"), 1), ("B. 猫", "B", ("猫", "狗"), 0), ("B. y", "B. anything else", ("x", "y"), 1),
    ("cafe\u0301", "A", ("café", "tea"), 1), ("café", "A", ("cafe\u0301", "tea"), 1), ("(B) or (C)", "B", (), 0), ("B. cat, C. dog", "BC", (), 1),
    ("B. is wrong", "B", (), 0)])
def test_texts_beside_letters(answer, gold, options, right):
    assert outcome(answer, gold, options) == right


@pytest.mark.timeout(60)
@pytest.mark.parametrize("piece", ["A. ", "(A) ", "A, ", "(A) cat, ", "because ", "is ", "so ", "answer ", "B. dog ", "A. 1 ", "option ", "and ", "B—", "B (",
    " is the answer", "**a**", "\\("])
def test_hostile_answers_come_at_once(piece):
    started = time.process_time()
    for options in (ANIMALS, ("1 cm", "2 cm") * 13, ("1 2 3 " * 600,) * 26):
        for size in (4_096, 50_000):
            outcome("B. " + piece * ((size - 4) // len(piece)), "B", options)
    assert time.process_time() - started < 20
