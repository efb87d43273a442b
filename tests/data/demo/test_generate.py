"""What is written: the same bytes for the same seed, held-out scans, records that the data room itself accepts."""
import json
import random

import pytest
from PIL import Image

from sophiavl_fast.data.dataset import Dataset
from sophiavl_fast.data.demo import digits, questions, soundness, traces
from sophiavl_fast.data.demo.questions import Question
from tests.data.demo.conftest import rows, write

NAMES = ["warmup", "train", "eval", "judge_train", "judge_eval"]


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_seed_writes_the_same_bytes(demo, tmp_path):
    assert files(write(tmp_path / "again")) == files(demo)


def test_another_seed_writes_other_pictures_and_questions(demo, tmp_path):
    other, mine = files(write(tmp_path / "other", seed=1)), files(demo)
    assert other.keys() == mine.keys()
    assert sum(other[name] == mine[name] for name in mine) == 1  # the registry alone
    assert other["dataset_info.json"] == mine["dataset_info.json"]


def test_held_out_scans_are_never_trained_on(demo):
    shown = {name: {scan for row in rows(demo, name) for scan in row["scans"]} for name in NAMES}
    held_out = {scan for scans in digits.scans_by_digit("eval").values() for scan in scans}
    assert len(held_out) == digits.HELD_OUT
    assert shown["eval"] and shown["judge_eval"] and (shown["eval"] | shown["judge_eval"]) <= held_out
    assert not (shown["warmup"] | shown["train"] | shown["judge_train"]) & held_out


def test_every_split_has_every_digit():
    for split in ("train", "eval"):
        assert min(len(scans) for scans in digits.scans_by_digit(split).values()) >= 20


@pytest.mark.parametrize("name", NAMES)
def test_pictures_show_one_cell_a_digit(demo, name):
    for row in rows(demo, name):
        assert (row["data_type"] == "image") == bool(row["path"]) == bool(row["scans"])
        if row["path"]:
            with Image.open(demo / row["path"]) as picture:
                picture.load()
                assert picture.size == (28 * len(row["digits"]), 28)
                low, high = picture.getextrema()
                assert low < 32 and high > 192  # ink on paper, not a blank


def test_a_held_out_scan_is_shown_as_it_is():
    import random

    import numpy as np
    from sklearn.datasets import load_digits

    picture, scans = digits.row([7], "eval", random.Random(0))
    small = np.asarray(picture.resize((8, 8), Image.Resampling.BOX), dtype=float)
    truth = load_digits().images[scans[0]] * 255 / 16
    assert np.corrcoef(small.ravel(), truth.ravel())[0, 1] > 0.97


@pytest.mark.parametrize("name", NAMES)
def test_records_keep_the_data_rooms_contract(demo, name):
    dataset = Dataset.open(f"demo_{name}", demo / "dataset_info.json")
    written = rows(demo, name)
    assert len(dataset) == len(written)
    for i, row in enumerate(written):
        example = dataset.example(i)
        assert f"<answer>{example.gold}</answer>" == row["solution"]
        assert ("reasoning_check" in example.record) == (not name.startswith("judge"))
    dataset.close()


def test_the_five_problem_types_and_text_only_questions_are_there(demo):
    for name in ("warmup", "train", "eval"):
        written = rows(demo, name)
        assert {row["problem_type"] for row in written} >= {"numerical", "multiple choice"}
    assert {row["problem_type"] for row in rows(demo, "train")} == {"numerical", "multiple choice", "OCR", "free-form", "text"}
    assert {row["data_type"] for row in rows(demo, "train")} == {"image", "text"}
    assert sum(kind.share for kind in questions.KINDS.values()) == pytest.approx(1)


def truth(row):
    """The answer worked out once more, from the digits and the words of the question."""
    d = row["digits"]
    number = {"sum?": sum(d), "max-min?": max(d) - min(d), "largest?": max(d)}.get(row["problem"], sum(d) if row["problem"][0].isdigit() else None)
    if row["options"]:
        return next(o[0] for o in row["options"] if int(o[3:].split("-")[0]) <= number <= int(o[3:].split("-")[1]))
    if number is not None:
        return str(number)
    if row["problem"] == "read":
        return " ".join(map(str, d))
    if row["problem"] == "range?":
        return f"from {min(d)} to {max(d)}"
    return {-1: "falling", 0: "level", 1: "rising"}[(d[-1] > d[0]) - (d[-1] < d[0])]


@pytest.mark.parametrize("name", ["train", "eval"])
def test_train_and_eval_hold_the_truth(demo, name):
    for row in rows(demo, name):
        assert row["solution"] == f"<answer>{truth(row)}</answer>", row
        assert soundness.exact_match(row, truth(row)) and row["process"] == ""


def test_the_warm_start_imitates_slips_in_the_majority(demo):
    written = rows(demo, "warmup")
    for row in written:
        response = row["process"] + row["solution"]
        right = soundness.answer_of(response) == truth(row)
        sound = soundness.check(row, response).sound
        assert (sound, right) == {"sound": (True, True), "slip": (False, False), "lucky": (False, True)}[row["flavour"]], row
    visible = [row for row in written if row["kind"] == "read"]  # a lost digit always shows
    assert 0.5 < sum(row["flavour"] != "sound" for row in visible) / len(visible) < 0.8
    assert any(row["flavour"] == "lucky" for row in visible)


def test_responses_and_questions_are_short(demo, tiny):
    from sophiavl_fast.data.processor import Processor

    processor = Processor(tiny)
    for name, longest in (("warmup", 48), ("train", 48), ("judge_train", 80)):
        dataset = Dataset.open(f"demo_{name}", demo / "dataset_info.json")
        for i, row in enumerate(rows(demo, name)):
            assert dataset.length(dataset.example(i), processor) <= longest
            assert len(processor.tokenizer(row["process"] + row["solution"])["input_ids"]) <= 44
        dataset.close()


def test_the_registry_is_in_the_form_of_dataset_info(demo):
    registry = json.loads((demo / "dataset_info.json").read_text())
    assert set(registry) == {f"demo_{name}" for name in NAMES}
    assert all(entry["columns"] == {"problem": "prompt", "solution": "answer", "path": "images"} for entry in registry.values())


def test_more_lucky_traces_leave_fewer_slips():
    """Three quarters of what is wrong lucky instead of an eighth; the share of sound lines stays."""
    def flavours(**how):
        rng = random.Random(0)
        drawn = [traces.draw(Question("spread", (2, 9, 4)), rng, **how).flavour for _ in range(4000)]
        return {name: drawn.count(name) / len(drawn) for name in ("sound", "slip", "lucky")}

    usual, lucky = flavours(), flavours(lucky_share=0.44)
    assert usual["sound"] == lucky["sound"] and abs(lucky["lucky"] - 0.44) < 0.03 and abs(lucky["slip"] - 0.15) < 0.03 and abs(usual["lucky"] - 0.08) < 0.02
