"""Traces with known flaws: what training may see and what it may not, and the rule that labels them."""
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from sophiavl_fast.data.demo import corrupted, generate, soundness
from sophiavl_fast.data.demo.judge_server import Rule, picture_key
from sophiavl_fast.data.demo.questions import KINDS, Question
from sophiavl_fast.data.demo.rationale import rationale
from sophiavl_fast.rewards.thinking import template


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corrupted")
    generate.write(folder / "data", 0, lambda rows, label, total: rows, scale=0.02)
    for name, held_out in (("train", False), ("held", True), ("again", False)):
        corrupted.write(folder / "data", folder / f"{name}.jsonl", 1200, 0, held_out=held_out)
    return folder


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open()]


def test_training_never_shows_the_unseen(written):
    kinds = {name: Counter(row["kind"] for row in rows(written, name)) for name in ("train", "held")}
    assert set(kinds["held"]) - set(kinds["train"]) == set(corrupted.UNSEEN) == {"astray", "half_misread"}
    assert set(corrupted.TRAINED) <= set(kinds["train"]) and min(kinds["held"].values()) >= 15
    for texts, unseen in corrupted.WORDS.values():
        assert not set(texts) & set(unseen)
        assert not any(words in row["response"] for row in rows(written, "train") for words in unseen)
    pictures = [{Path(image).parent.name for row in rows(written, name) for image in row["images"]} for name in ("train", "held")]
    assert pictures == [{"train"}, {"eval"}]


def test_the_answer_tells_nothing_about_the_reasoning(written):
    held = rows(written, "held")
    right = {sound: [row["right"] for row in held if (row["score"] == 1.0) is sound] for sound in (True, False)}
    shares = [sum(found) / len(found) for found in right.values()]
    assert abs(shares[0] - shares[1]) < 0.1 and all(0.4 < share < 0.6 for share in shares)
    assert all(row["kind"] != "sound" or row["score"] == 1.0 for row in held)
    corrupt = [row["score"] for row in held if row["kind"] not in ("sound", "slip")]
    assert all(score < 0.8 or score == 1.0 for score in corrupt)           # what --threshold 0.8 separates
    assert sum(score == 1.0 for score in corrupt) < 0.05 * len(corrupt)    # a digit that does not matter was changed


def test_the_same_seed_writes_the_same_bytes(written):
    assert (written / "train.jsonl").read_bytes() == (written / "again.jsonl").read_bytes()


def test_the_rule_behind_the_server_is_the_label(written):
    """By the prompts of both templates; and the rationale's rows alone say the score, so that a judge which writes them has nothing left to guess."""
    rule = Rule(written / "data")
    asked = {name: template.load(name) for name in ("demo_judge", "demo_judge_rationale")}
    seen = set()
    for row in rows(written, "held")[:300]:
        reasoning = row["response"].partition("<think>")[2].partition("</think>")[0]
        images = [(written / image).read_bytes() for image in row["images"]]
        first, second = (rule.reply(judge.user(row["question"], reasoning), images) for judge in asked.values())
        assert first == second
        rationale, _, score = first.removeprefix("<think>").removesuffix("</answer>").partition("</think><answer>")
        assert float(score) == pytest.approx(row["score"], abs=1e-4)
        compared = re.findall(r"([a-h])((?::(?:.[.!])*.)?)([A-H]|x|(?<=[a-h])-)(?=[a-h][:-]|$)", rationale)
        assert "".join("".join(parts) for parts in compared) == rationale
        assert [letter for letter, _, _ in compared] == list("abcdefgh"[:len(compared)])
        right = [mark for _, _, mark in compared if mark not in "x-"]
        assert right == list("ABCDEFGH"[:len(right)]) and len(right) / len(compared) == pytest.approx(row["score"], abs=1e-4)
        assert all(mark == "x" for _, line, mark in compared if "!" in line)
        seen.add(row["question"].partition("\n")[0])
    assert len(seen) > len(KINDS)
    with pytest.raises(KeyError):
        rule.reply("what?\n1\nscore?", [])


def test_the_rationale_marks_every_character_that_differs():
    question = Question("sum", (5, 8, 3))
    assert rationale(question, "5 8 3\n5+8=13\n13+3=16") == "a:5. .8. .3./Ab:5.+.8.=.1.3./Bc:1.3.+.3.=.1.6./C"
    assert rationale(question, "5 8 3\n5+8=3\n13+3=16") == "a:5. .8. .3./Ab:5.+.8.=.1!3xc:1.3.+.3.=.1.6./B"                      # ends too early
    assert rationale(question, "5 8 3\n13+3=16") == "a:5. .8. .3./Ab:1.3.+.3.=.1.6./Bc-"                                        # a step left out
    assert rationale(question, "5 8 3\n8+5=13\n13+3=16\nwell") == "a:5. .8. .3./Ab:8.+.5.=.1.3./Bc:1.3.+.3.=.1.6./Cd:/!_!_!_!_x"  # another spelling; too much
    assert rationale(question, "5 8\n\n5+8=134") == "a:5. .8. xb:5.+.8.=.1.3./!_xc-"                                            # too short, too long
    assert rationale(question, "5 8 3\n13+3=16\n5+8=13") == "a:5. .8. .3./Ab:1.3.+.3.=.1.6./Bc:/!_!_!_!_!_!_x"                   # never back
    assert rationale(question, "") == "a-b-c-" and len(rationale(question, "\n".join("no" * 40))) > 80


def test_a_pair_of_the_rationale_lies_as_far_behind_its_character_as_any_other():
    """What the judge's prompt promises to a small model: pair i is about the character at 2 i, for every trace."""
    asked, question = template.load("demo_judge_rationale"), Question("sum", (5, 8, 3))
    for reasoning in ("5 8 3\n5+8=13\n13+3=16", "5 8 3\n5+8=3\n13+3=16\nok", "8\n  \n5+8=134\n8 8", "c"):
        shown = asked.user("sum?", reasoning).partition("\n")[2].removesuffix("check?")
        assert len(shown) == 64 and set(shown[1::2]) == {" "}
        pairs = re.sub("[a-z]-", "", rationale(question, reasoning))
        assert len(pairs) == 2 * len(shown[::2].rstrip(" "))
        for own, mark, character in zip(pairs[::2], pairs[1::2], shown[::2]):
            match mark:
                case ":" | ".":
                    assert own == character
                case "!":
                    assert own != character
                case verdict:
                    assert character == "\n" and verdict in "ABCx"


def test_pictures_are_known_by_their_pixels(written):
    path = next((written / "data" / "images" / "eval").glob("*.png"))
    from io import BytesIO

    from PIL import Image

    other = BytesIO()
    Image.open(path).convert("RGB").save(other, "BMP")
    assert picture_key(other.getvalue()) == picture_key(path.read_bytes())
    assert soundness.check_trace({"kind": "add", "digits": [1, 2]}, "1 2\n1+2=3").sound
