"""Judges of known faults say what they should, and the study reads gamma, flipped advantages and wrong thinking off a run's samples as defined."""
import importlib.util
import json
import math
from pathlib import Path

import pytest

from sophiavl_fast.data.demo import generate
from sophiavl_fast.data.demo.judge_server import JUDGES, Rule

ROOT = Path(__file__).resolve().parents[3]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def study():
    return script("judge_study")


def row(thinking, outcome, sound, advantage, gamma=1.0, group=0, uniform=False):
    return {"step": 1, "group": group, "thinking": thinking, "outcome": outcome, "sound": sound, "advantage": advantage, "gamma": gamma, "uniform": uniform}


def test_judges_distort_the_rule_in_their_own_way(tmp_path):
    generate.write(tmp_path, 0, lambda rows, label, total: rows, scale=0.01)

    def score(judge, text, seed=None):
        return float(Rule(tmp_path, judge).reply(text, [], seed).partition("<answer>")[2].removesuffix("</answer>"))

    right, wrong, long = (f"5+8+3?\n{lines}\nscore?" for lines in ("5 8 3\n5+8=13\n13+3=16", "5 8 3\n5+8=13\n13+3=17", "so " * 20))
    assert [score("sound", text) for text in (right, wrong, long)] == pytest.approx([1, 2 / 3, 0], abs=1e-4)
    assert [score("inverted", text) for text in (right, wrong, long)] == pytest.approx([0, 1 / 3, 1], abs=1e-4)
    assert score("length", right) == score("length", wrong) < score("length", long) == 1
    drawn = [score("random", right, seed) for seed in range(200)]
    assert len(set(drawn)) > 150 and 0.4 < sum(drawn) / 200 < 0.6 and score("random", right, 7) == drawn[7] and all(0 <= x <= 1 for x in drawn)
    assert set(JUDGES) == {"sound", "random", "inverted", "length"}


def test_gamma_is_held_against_the_formula(study):
    cell = study.Cell("inverted", "paper", "score", 0)
    gamma = math.exp(0.25 - 0.75)
    mixed = [row(0.0, 1.0, True, 0.5, gamma), row(0.5, 1.0, True, 0.5, gamma), row(0.75, 0.0, False, -1.0, gamma)]
    uniform = [row(0.0, 1.0, True, -0.7, group=1, uniform=True), row(1.0, 1.0, False, 0.7, group=1, uniform=True)]
    assert study.against_formula(mixed + uniform, cell) == {"gamma_mixed": pytest.approx(gamma), "gamma_gap_max": pytest.approx(0), "mixed_groups": 1}
    off = [{**r, "gamma": 1.0} for r in mixed]
    assert study.against_formula(off, cell)["gamma_gap_max"] == pytest.approx(1 - gamma)


def test_flipped_advantages_by_kind_of_group(study):
    mixed = [row(0, 1.0, True, -0.1), row(1, 1.0, False, 0.6), row(1, 0.0, False, -0.5)]                       # one right answer pushed down
    uniform = [row(0.0, 1.0, True, -0.7, group=1, uniform=True), row(1.0, 1.0, False, 0.7, group=1, uniform=True)]  # soundness turned round
    silent = [row(0.3, 0.0, False, 0.0, group=2, uniform=True)] * 2                                              # nothing to tell apart
    assert study.flipped(mixed + uniform + silent) == {"flipped_mixed": pytest.approx(1 / 3), "flipped_uniform": 1.0, "uniform_share": pytest.approx(1.4 / 2.6)}


def test_a_finished_run_becomes_a_row_and_a_picture(study, tmp_path):
    answers = [{"right": True, "sound": True, "tokens": 20}, {"right": True, "sound": False, "tokens": 22}, {"right": False, "sound": False, "tokens": 24}]
    cells = [study.Cell("sound", "paper", "skip", 0), study.Cell("none", "off", "score", 0), study.Cell("none", "off", "score", 1)]
    for cell in cells:
        folder = tmp_path / cell.name
        folder.mkdir()
        assert not study.finished(folder)
        (folder / "samples.jsonl").write_text("\n".join(json.dumps(row(None, o, True, o - 0.5)) for o in (0.0, 1.0)))
        (folder / "held_out.json").write_text(json.dumps({"answers": answers}))
        assert study.finished(folder)
    assert set(study.collected(tmp_path)) == set(cells)
    rows = [study.measured(tmp_path / cell.name, cell) for cell in cells]
    assert rows[0]["accuracy"] == pytest.approx(2 / 3) and rows[0]["unsound_of_right"] == 0.5 and rows[0]["length"] == 22
    found = {(line["judge"], line["seeds"]): line for line in study.summary(rows)}
    assert found["none", 2]["reasoning"] == pytest.approx([1 / 3] * 3) and found["sound", 1]["gamma_mixed"] == []
    study.draw(tmp_path / "study.svg", rows)
    picture = (tmp_path / "study.svg").read_text()
    assert picture.count("<circle") == 3 * len(rows) and "plain GRPO" in picture and "sound, paper, skip" in picture


def test_intervals_widen_with_what_seeds_disagree_on(study):
    assert study.interval([0.5]) == [0.5, 0.5, 0.5]
    middle, low, high = study.interval([0.0, 0.1, 0.2, 0.3, 0.4])
    assert middle == pytest.approx(0.2) and 0.05 <= low < middle < high <= 0.35


def test_other_judges_of_the_same_responses():
    """By hand: one mixed group where an inverted judge lowers gamma, a graded one that it turns, a uniform one that is its own."""
    offline = script("judge_offline")
    think = {"response": "<think>1 2</think><answer>3</answer>"}
    rows = [row(1.0, 1.0, True, 0) | think, row(0.0, 0.0, False, 0) | think,
            row(0.0, 0.5, False, 0, group=1) | think, row(1.0, 0.6, True, 0, group=1) | think,
            row(1.0, 1.0, True, 0, group=2) | think, row(0.0, 1.0, False, 0, group=2) | think]
    assert [offline.kind_of(rows[i:i + 2]) for i in (0, 2, 4)] == ["mixed", "graded", "uniform"] and offline.reasoning(rows[0]) == "1 2"
    sound = offline.judged(rows, "sound", "paper", "score", 0.3)
    assert [sound[f"flipped_{kind}"] for kind in offline.KINDS] == [0, 0, 0]
    assert sound["gamma_mean"] == 1 and sound["share_uniform"] == pytest.approx(1 / 3, 1e-4)
    inverted = offline.judged(rows, "inverted", "paper", "score", 0.3)
    assert [inverted[f"flipped_{kind}"] for kind in offline.KINDS] == [0, 1, 1]       # 0.5 + 0.3 beats 0.6: both answers count as right, gamma is 1
    assert inverted["gamma_min"] == pytest.approx(math.exp(-1)) and offline.judged(rows, "inverted", "off", "score", 0.3)["gamma_min"] == 1
    assert offline.judged(rows, "inverted", "paper", "skip", 0.3)["share_uniform"] == 0
