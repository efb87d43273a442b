"""Alarms begin and end where the numbers say so, once each, in the log, in the report and over a restart."""
import json

import pytest

from sophiavl_fast.config import Config
from sophiavl_fast.monitor import RunLog, alarms, write_report

W = alarms.WINDOW


def steps(count, first=1, **series):
    """Metrics of steps first.. with a constant reward; series: functions of the step number."""
    calm = {"reward/total": 0.5, "reward/outcome": 0.4, "reward/thinking": 0.5, "reward/unscored": 0.0, "response/length_mean": 100.0}
    return [{"step": s, **calm, **{k.replace("__", "/"): f(s) for k, f in series.items()}} for s in range(first, first + count)]


def test_a_calm_run_is_silent():
    assert alarms.sounding(steps(5 * W)) == {} and alarms.spans(steps(5 * W)) == []


@pytest.mark.parametrize("name, series", [
    ("hacking", {"reward__thinking": lambda s: 0.3 + 0.01 * s, "reward__outcome": lambda s: 0.5 - 0.01 * s}),
    ("length", {"response__length_mean": lambda s: 100 * 1.05 ** s}), ("length", {"response__length_mean": lambda s: 100 * 0.95 ** s}),
    ("unscored", {"reward__unscored": lambda s: 0.3})])
def test_each_says_what_it_saw(name, series):
    (found,) = alarms.sounding(steps(2 * W, **series)).items()
    assert found[0] == name and any(c.isdigit() for c in found[1])
    assert alarms.sounding(steps(2 * W - 1, **series)) == {}, "two windows are needed"


@pytest.mark.parametrize("series", [
    {"reward__thinking": lambda s: 0.3 + 0.01 * s}, {"reward__outcome": lambda s: 0.5 - 0.01 * s},
    {"reward__thinking": lambda s: 0.3 + 0.01 * s, "reward__outcome": lambda s: 0.1 + 0.01 * s},
    {"response__length_mean": lambda s: 100 + s}, {"reward__unscored": lambda s: 0.1}], ids=["better thoughts", "worse answers", "both", "growth", "few"])
def test_half_of_a_sign_is_none(series):
    assert alarms.sounding(steps(3 * W, **series)) == {}


def test_missing_numbers_are_no_sign():
    rows = steps(3 * W, reward__thinking=lambda s: None, response__length_mean=lambda s: None)
    assert alarms.sounding(rows) == {}
    assert alarms.sounding([{"step": s, "loss": 1.0} for s in range(3 * W)]) == {}


def log_all(folder, rows, resume):
    with RunLog(folder, Config(), resume) as log:
        return [line for row in rows for line in log.metrics(row["step"], {k: v for k, v in row.items() if k != "step"})]


def test_the_log_tells_of_a_beginning_once_and_a_restart_changes_nothing(tmp_path):
    rows = steps(6 * W, reward__unscored=lambda s: 0.5 if 25 <= s < 35 else 0.0)
    said = log_all(tmp_path / "whole", rows, None)
    assert len(said) == 1 and said[0].startswith("alarm (unscored): ")
    for cut in (15, 30, 45):
        folder = tmp_path / f"cut-{cut}"
        log_all(folder, rows[:cut + 3], None)
        log_all(folder, rows[cut:], cut)
        assert (folder / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    on = [m["step"] for m in lines if m["alarm/unscored"]]
    (span,) = alarms.spans(lines)
    assert (span["first"], span["last"]) == (on[0], on[-1]) and len(on) == on[-1] - on[0] + 1


def test_the_report_names_the_alarm_and_its_steps(tmp_path):
    log_all(tmp_path, steps(3 * W, reward__unscored=lambda s: 0.5), None)
    page = write_report(tmp_path).read_text()
    assert f"steps {2 * W}–{3 * W}" in page and "50% of the thinking scores could not be had" in page
    log_all(tmp_path / "calm", steps(3 * W), None)
    assert "<h2>Alarms</h2>" not in write_report(tmp_path / "calm").read_text()
