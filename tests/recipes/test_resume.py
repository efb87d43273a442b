"""kill -9 in every phase, then run.resume=auto: every metric but times, rates and memory equals the uninterrupted run's."""
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes.conftest import ROOT, run

NOISY = ("time/", "mem/", "transfer/")


def exact(run_dir: Path) -> list[dict]:
    """metrics.jsonl without times, rates and memory."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(NOISY) and not k.endswith("tokens_per_s")} for r in rows]


def samples(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(demo, tmp_path_factory):
    return run_once(demo, tmp_path_factory.mktemp("whole") / "run")


def arguments(demo, run_dir: Path, *more: str) -> list[str]:
    
    return ["configs/demo.yaml", f"data.registry={demo}/data/dataset_info.json", f"run.dir={run_dir}", f"model.path={demo}/warm",
            f"thinking.path={demo}/judge", "run.steps=4", "rollout.prompts_per_step=6", "rollout.n=4", "eval.every=2", "eval.limit=8",
            "checkpoint.every=2", "algorithm.kl_coef=0.04", *more]


def run_once(demo, run_dir: Path, *more: str) -> Path:
    run("train", *arguments(demo, run_dir, *more))
    return run_dir


def kill(demo, run_dir: Path, phase: str, visit: int, delay: float, *more: str) -> None:
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("killer.py")), phase, str(visit), str(delay), *arguments(demo, run_dir, *more)],
                          cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert done.returncode == -signal.SIGKILL, f"exit {done.returncode}: {done.stderr[-2000:]}"


def same(whole: Path, resumed: Path) -> None:
    assert exact(resumed) == exact(whole)
    assert samples(resumed) == samples(whole)


@pytest.mark.engine
def test_killed_in_the_middle_of_an_update(demo, uninterrupted, tmp_path):
    out = tmp_path / "run"
    kill(demo, out, "update", 3, 0.02)
    same(uninterrupted, run_once(demo, out))


@pytest.mark.kill
@pytest.mark.engine
@pytest.mark.parametrize("phase,visit,delay", [("rollout", 1, 0.1), ("rollout", 4, 0.1), ("reward", 3, 0.02), ("transfer", 3, 0.01), ("save", 1, 0.01),
                                               ("save", 2, 0.03), ("save", 2, 0.1), ("evaluate", 2, 0.1), ("export", 1, 0.02)])
def test_killed_in_every_phase(demo, uninterrupted, tmp_path, phase, visit, delay):
    out = tmp_path / "run"
    kill(demo, out, phase, visit, delay)
    same(uninterrupted, run_once(demo, out))


@pytest.mark.kill
@pytest.mark.engine
def test_killed_trainer_leaves_its_server_for_a_moment_and_the_next_one_does_not_trust_it(demo, uninterrupted, tmp_path):
    out = tmp_path / "run"
    kill(demo, out, "rollout", 4, 0.1, "rollout.engine=server")
    same(uninterrupted, run_once(demo, out, "rollout.engine=server"))


@pytest.mark.engine
def test_a_finished_run_trains_nothing_more_but_its_export_is_made(demo, uninterrupted):
    """As after a kill between the last checkpoint and the export."""
    before = exact(uninterrupted)
    (uninterrupted / "hf" / "model.safetensors").unlink()
    run_once(demo, uninterrupted)
    assert exact(uninterrupted) == before and (uninterrupted / "hf" / "model.safetensors").exists()
