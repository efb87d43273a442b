"""Rollouts ahead of the policy: which weights each token was drawn from, that staleness never exceeds its bound, and what goes on meanwhile."""
import json
import math
import threading
from pathlib import Path

import pytest

from sophiavl_fast.config import Config, load
from sophiavl_fast.data.loader import Loader
from sophiavl_fast.data.processor import Processor
from sophiavl_fast.policy import checkpoint
from tests.recipes.conftest import run
from tests.rewards.helpers import chat, judge_server


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def flawed(demo, tmp_path) -> Path:
    """The demo's registry with every third record of its training set without a solution."""
    registry = json.loads((demo / "data/dataset_info.json").read_text())
    entry = registry["demo_train"]
    rows = lines(demo / "data" / entry["file_path"])
    for row in rows[::3]:
        row["solution"] = ""
    (tmp_path / "flawed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    moved = entry | {"file_path": "flawed.jsonl", "image_base_path": str(demo / "data" / entry["image_base_path"])}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"flawed": moved}))
    return tmp_path / "dataset_info.json"


def unusable(config: Config, steps: int) -> int:
    """Records without use that a stream of so many steps meets."""
    loader = Loader.open(config, Processor(config.model.path))
    loader.next(steps * config.rollout.prompts_per_step)
    loader.close()
    return loader.skipped


@pytest.mark.engine
def test_a_run_one_step_ahead(rl, tmp_path, flawed):
    """Weights are swapped under requests in flight; after each swap the engine's log-probs must be the new weights' own."""
    out = tmp_path / "run"
    run(*rl(out, "run.steps=5", "eval.every=0", "rollout.engine=server", "rollout.staleness=1", f"debug.record={out}/rollouts",
            "rollout.max_new_tokens=56", "checkpoint.every=2", f"data.registry={flawed}", "data.train=flawed", "data.on_error=skip"))
    metrics = lines(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5]
    for m in metrics:
        assert m["rollout/probe_diff_max"] <= 1e-4
        assert 0 <= m["rollout/lag_mean"] <= m["rollout/lag_max"] <= 1
        assert m["rollout/tokens_per_s"] == pytest.approx(m["response/tokens"] / m["rollout/busy_s"])   # of the engines' work, not of what was waited for
        assert m["policy/tis_weight_mean"] is not None and math.isfinite(m["loss"])
    assert metrics[0]["rollout/lag_max"] == 0 and max(m["rollout/lag_max"] for m in metrics[1:]) == 1
    for step in range(1, 6):
        groups = [line for file in out.glob(f"rollouts/step_{step}-*.jsonl") for line in lines(file)]
        versions = [r["weight_versions"] for g in groups for r in g["responses"]]
        assert all(v == sorted(v) and max(0, step - 2) <= v[0] and v[-1] <= step - 1 for v in versions)
    # a checkpoint of step 4 goes on with the prompts of step 5, though they were drawn before it was written
    state = checkpoint.read_state(out / "checkpoints" / "step_4")
    assert state["loader"]["cursor"] == 4 * 6
    config = load(out / "config.yaml")
    counts = [unusable(config, step) for step in range(1, 6)]
    assert [m["data/skipped"] for m in metrics] == counts and counts[3] < counts[4], "those of a step drawn ahead are not yet counted"
    assert state["loader"]["skipped"] == counts[3]


@pytest.mark.engine
def test_the_next_step_is_scored_while_this_one_still_is(rl, tmp_path):
    """The judge answers nobody before it has been asked about a response of step 2, while step 1 waits for its scores."""
    out, beyond = tmp_path / "run", threading.Event()

    def patient(handler, body, number):
        if number >= 30:   # 6 prompts x 5 responses a step
            beyond.set()
        handler.reply(chat("<answer>0.5</answer>") if beyond.wait(100) else "no answer", 200)

    with judge_server(patient) as judge:
        run(*rl(out, "run.steps=3", "eval.every=0", "rollout.engine=server", "rollout.staleness=1", "checkpoint.every=0", "thinking.backend=endpoint",
                f"thinking.url={judge.url}", "thinking.model=judge", "thinking.on_error=fail", "thinking.score=parse", "thinking.concurrency=64",
                "thinking.timeout_s=150", "thinking.retries=0"))
    metrics = lines(out / "metrics.jsonl")
    assert [m["reward/unscored"] for m in metrics] == [0, 0, 0] and [round(m["reward/thinking"], 6) for m in metrics] == [0.5] * 3


@pytest.mark.engine
def test_a_run_that_fails_while_the_next_step_is_sampled_ends(rl, tmp_path):
    """Requests in flight are nobody's then: the process must not wait for their answers."""
    def failing(handler, body, number):
        handler.reply({"error": "no"}, 500)

    with judge_server(failing) as judge:
        done = run(*rl(tmp_path / "run", "run.steps=3", "eval.every=0", "rollout.engine=server", "rollout.staleness=1", "checkpoint.every=0",
                       "thinking.backend=endpoint", f"thinking.url={judge.url}", "thinking.model=judge", "thinking.on_error=fail", "thinking.score=parse",
                       "thinking.retries=0"), check=False, timeout=120)
    assert done.returncode == 2 and "500" in done.stderr.splitlines()[-1], done.stderr[-2000:]
