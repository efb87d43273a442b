"""Reference answers that no response can match are told apart from those of every published form."""
import pytest

from sophiavl_fast.errors import UserError
from sophiavl_fast.rewards.golds import refuse_unmatchable
from sophiavl_fast.rewards.graders import grade
from sophiavl_fast.rewards.graders.task import Task

PLAIN, LETTERED = ("w", "x", "y", "z"), ("A. cat", "B. dog", "C. A bird", "D. 12 cm")


@pytest.mark.parametrize("gold,options,answer", [
    ("A", LETTERED, "A"), ("B", LETTERED, "dog"), ("C. A bird", LETTERED, "C"), ("a bird", LETTERED, "C"), ("12 cm", LETTERED, "D"), ("(D)", PLAIN, "D"),
    ("A, B", PLAIN, "A and B"), ("ABD", PLAIN, "A, B, D"), ("A and C", LETTERED, "AC"), ("b", PLAIN, "x"), ("B. a hound", LETTERED, "B"),
    ("x", PLAIN, "B"), ("$B$", PLAIN, "B"),
    (r"\boxed{B}", PLAIN, "B"), ("The answer is B.", PLAIN, "B"), ("2", ("1", "2"), "B"), ("No", ("Yes", "No"), "B"), ("E", (), "E"), ("a word", (), "a word")])
def test_what_an_answer_can_match(gold, options, answer):
    refuse_unmatchable("multiple_choice", gold, options)
    assert grade(Task("multiple_choice", answer, gold, options)) == 1.0


@pytest.mark.parametrize("gold,options", [("2", PLAIN), ("E", PLAIN), ("foo", PLAIN), ("A,E", PLAIN), ("E. cat", LETTERED), ("fish", LETTERED),
                                          ("A or\nB", PLAIN)])
def test_a_choice_that_is_none_of_the_options(gold, options):
    assert not any(grade(Task("multiple_choice", letter, gold, options)) for letter in "ABCD")
    with pytest.raises(UserError, match=r"^the solution '[^\n]*' names none of the 4 options: expected letters A to D, or an option's own text$"):
        refuse_unmatchable("multiple_choice", gold, options)


@pytest.mark.parametrize("kind,gold", [("numerical", "$"), ("numerical", "*"), ("multiple_choice", "$$"), ("multiple_choice", "a" * 5000)])
def test_a_gold_of_which_nothing_is_left(kind, gold):
    assert grade(Task(kind, gold, gold)) == 0.0
    with pytest.raises(UserError, match=r"^the solution '.*' can be matched by no answer"):
        refuse_unmatchable(kind, gold, ())


@pytest.mark.parametrize("kind,gold", [("numerical", "5"), ("numerical", "$5"), ("numerical", r"\frac{1}{2}"), ("numerical", "x" * 100_000),
                                       ("numerical", "no"), ("text", "$"), ("ocr", "$"), ("free_form", "?")])
def test_other_golds_are_left_alone(kind, gold):
    refuse_unmatchable(kind, gold, ())
