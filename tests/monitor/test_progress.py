"""Progress: one plain line a step in a log file, a live display on a terminal, nothing from other ranks."""
import io
import time

import pytest
from rich.console import Console

from sophiavl_fast.monitor.numbers import clock, compact, sparkline
from sophiavl_fast.monitor.progress import Progress


def run(steps, *, terminal=False, lead=True):
    out = io.StringIO()
    with Progress("trust_grpo", steps, lead=lead, console=Console(file=out, force_terminal=terminal, width=140, color_system=None)) as progress:
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
    assert "left" in rows[0] and "left" not in rows[3]


def test_a_long_line_is_not_wrapped():
    out = io.StringIO()
    with Progress("x", 1, console=Console(file=out, width=20)) as progress:
        progress.step(1, {"reward/total": 1.0, "reward/outcome": 1.0, "trust/gamma": 1.0, "loss": 0.5})
    assert len(out.getvalue().splitlines()) == 1


def test_other_ranks_are_silent():
    assert run(3, lead=False) == run(3, lead=False, terminal=True) == ""


def test_a_terminal_shows_the_latest_step():
    text = run(3, terminal=True)
    assert "step 3/3" in text and "gamma 0.970" in text and "━" in text


def test_phases_are_timed_and_add_up_within_a_step():
    progress = Progress("x", 2, lead=False)
    for _ in range(2):
        with progress.phase("update"):
            time.sleep(0.02)
    with progress.phase("rollout"), progress.phase("reward"):
        time.sleep(0.01)
    times = progress.times()
    assert set(times) == {"time/update_s", "time/rollout_s", "time/reward_s", "time/step_s"}
    assert times["time/update_s"] >= 0.04 and times["time/rollout_s"] >= times["time/reward_s"] >= 0.01
    assert times["time/step_s"] >= times["time/update_s"] + times["time/rollout_s"]
    progress.step(1, {})
    assert progress.seconds == {}


def test_a_phase_that_fails_is_left_and_timed():
    progress = Progress("x", 1, lead=False)
    with pytest.raises(RuntimeError), progress.phase("update"):
        raise RuntimeError
    assert progress.seconds["update"] >= 0 and progress._phases == []


def test_a_bar_in_a_log_file_is_one_line_at_its_end():
    out = io.StringIO()
    with Progress("x", 1, console=Console(file=out)) as progress, progress.bar("checking data", 1200) as bar:
        for _ in range(1200):
            bar.advance()
    assert out.getvalue().startswith("checking data 1,200 in ") and out.getvalue().count("\n") == 1


def test_numbers_as_people_read_them():
    assert [compact(x) for x in (0.8734, 12.44, 5210.3, 3.1e-6, 0.0, 7, 1234567, None)] == ["0.873", "12.4", "5,210", "3.1e-06", "0.000", "7", "1,234,567", "–"]
    assert [clock(x) for x in (8.44, 151, 3730)] == ["8.4 s", "2:31", "1:02:10"]
    assert sparkline([0, 1, 2]) == "▁▄█" and sparkline([1, 1]) == "▄▄"
