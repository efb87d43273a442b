"""Progress: one plain line a step in a log file, a live display on a terminal, nothing from other ranks."""
import io
import time

import pytest
from rich.console import Console

from sophiavl_fast.config import Config, Monitor, Run
from sophiavl_fast.monitor.numbers import clock, compact, sparkline
from sophiavl_fast.monitor.progress import Progress


def shown(steps, out, *, width=160, terminal=False, progress=True):
    config = Config(run=Run(steps=steps, dir="runs/x"), monitor=Monitor(progress=progress))
    return Progress(config, "Trust-GRPO", console=Console(file=out, force_terminal=terminal, width=width, color_system=None))


def run(steps, **options):
    out = io.StringIO()
    with shown(steps, out, **options) as progress:
        for step in range(1, steps + 1):
            with progress.phase("rollout"):
                pass
            progress.step(step, {"reward/total": step / 10, "trust/gamma": 0.97, "reward/thinking": None, "rollout/tokens_per_s": 5123.4})
    return out.getvalue()


def test_a_log_file_gets_one_plain_line_a_step():
    text = run(4)
    rows = text.splitlines()
    assert len(rows) == 4 and "\x1b" not in text
    assert rows[1].startswith("step 2/4 · reward 0.200 · gamma 0.970 · rollout 5,123 tokens/s") and "thinking" not in text
    assert "left" in rows[1] and "left" not in rows[3]


def test_a_long_line_is_not_wrapped():
    out = io.StringIO()
    with shown(1, out, width=20) as progress:
        progress.step(1, {"reward/total": 1.0, "reward/outcome": 1.0, "trust/gamma": 1.0, "loss": 0.5})
    assert len(out.getvalue().splitlines()) == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_other_ranks_and_a_run_without_progress_are_silent(terminal, monkeypatch):
    assert run(3, terminal=terminal, progress=False) == ""
    monkeypatch.setenv("RANK", "1")
    assert run(3, terminal=terminal) == ""


def test_a_terminal_shows_the_latest_step():
    text = run(3, terminal=True)
    assert "step 3/3" in text and "gamma 0.970" in text and "━" in text


def test_phases_are_timed_and_add_up_within_a_step():
    progress = shown(2, io.StringIO())
    for _ in range(2):
        with progress.phase("update") as update:
            time.sleep(0.02)
    with progress.phase("rollout") as rollout, progress.phase("reward") as reward:
        time.sleep(0.01)
    assert progress.seconds["update"] >= 0.04 and update.seconds >= 0.02
    assert progress.seconds == {"update": progress.seconds["update"], "reward": reward.seconds, "rollout": rollout.seconds}
    assert rollout.seconds >= reward.seconds >= 0.01
    progress.step(1, {})
    assert progress.seconds == {}


def test_a_phase_that_fails_is_left_and_timed():
    progress = shown(1, io.StringIO())
    with pytest.raises(RuntimeError), progress.phase("update"):
        raise RuntimeError
    assert "update" in progress.seconds and progress._phases == []


def test_a_bar_in_a_log_file_is_one_line_at_its_end():
    out = io.StringIO()
    with shown(1, out) as progress, progress.bar("checking data", 1200) as bar:
        for _ in range(1200):
            bar.advance()
    assert out.getvalue().startswith("checking data 1,200 in ") and out.getvalue().count("\n") == 1


def test_numbers_as_people_read_them():
    assert [compact(x) for x in (0.8734, 12.44, 5210.3, 3.1e-6, 0.0, 7, 1234567, None)] == ["0.873", "12.4", "5,210", "3.1e-06", "0.000", "7", "1,234,567", "–"]
    assert [clock(x) for x in (8.44, 151, 3730)] == ["8.4 s", "2:31", "1:02:10"]
    assert sparkline([0, 1, 2]) == "▁▄█" and sparkline([1, 1]) == "▄▄"
