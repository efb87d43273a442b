"""Engines that sleep while the trainer updates and saves (`rollout.sleep`): the run is the same, bit for bit."""
import json
from pathlib import Path

import pytest

from tests.recipes.conftest import run
from tests.recipes.test_resume import exact, samples, two_ranks

pytestmark = pytest.mark.engine
MORE = ("run.steps=2", "checkpoint.every=1", "monitor.tensorboard=false")
SLEEP = ("rollout.sleep=true", "policy.offload_optimizer=true")


def times(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_sleeps_is_the_run_that_does_not(rl, tmp_path):
    """Evaluation after a step's transfer, and rollouts after a save, find the engine awake."""
    run(*rl(tmp_path / "awake", *MORE))
    run(*rl(tmp_path / "asleep", *MORE, *SLEEP))
    assert exact(tmp_path / "asleep") == exact(tmp_path / "awake") and samples(tmp_path / "asleep") == samples(tmp_path / "awake")
    assert all(m["time/sleep_s"] > 0 and "time/transfer_wake_s" in m for m in times(tmp_path / "asleep")[1:])
    assert not any("time/sleep_s" in m for m in times(tmp_path / "awake"))


@pytest.mark.slow
@pytest.mark.layout
def test_two_ranks_and_two_servers_that_sleep(demo, rl, tmp_path):
    """Two tensor-parallel ranks: the second begins its update once the engines sleep, and gathers the weights once they are awake."""
    server = ("rollout.engine=server", "rollout.engines=2", "rollout.start_timeout_s=900", "eval.every=0")
    for name, more in (("awake", ()), ("asleep", SLEEP)):
        done = two_ranks("-m", "sophiavl_fast", *rl(tmp_path / name, *MORE, *server, *more))
        assert done.returncode == 0, done.stderr[-3000:]
    assert exact(tmp_path / "asleep") == exact(tmp_path / "awake") and samples(tmp_path / "asleep") == samples(tmp_path / "awake")
    assert all(m["time/sleep_s"] > 0 and m["time/transfer_wake_s"] > 0 for m in times(tmp_path / "asleep"))
