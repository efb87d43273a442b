"""kill -9 in every phase, then run.resume=auto: every metric but times, rates and memory equals the uninterrupted run's."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
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
                          cwd=ROOT, capture_output=True, text=True, timeout=1800)
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
@pytest.mark.parametrize("background", ["false", "true"])
def test_killed_while_parts_are_saved(demo, uninterrupted, tmp_path, background):
    """megatron's format; and what it left, a run that saves the other one goes on from."""
    out, more = tmp_path / "run", ("checkpoint.format=torch_dist", f"checkpoint.background={background}")
    kill(demo, out, "save", 2, 0.03, *more)
    assert (out / "checkpoints/step_2/.metadata").is_file()
    same(uninterrupted, run_once(demo, out))


@pytest.mark.kill
@pytest.mark.engine
@pytest.mark.parametrize("visit", [2, 3])
def test_killed_while_the_engine_falls_asleep(demo, uninterrupted, tmp_path, visit):
    """Before an update and before a save; the whole run sleeps, the uninterrupted one did not."""
    out, more = tmp_path / "run", ("rollout.sleep=true", "policy.offload_optimizer=true")
    kill(demo, out, "sleep", visit, 0.0, *more)
    same(uninterrupted, run_once(demo, out, *more))


@pytest.mark.kill
@pytest.mark.engine
def test_killed_trainer_leaves_its_server_for_a_moment_and_the_next_one_does_not_trust_it(demo, uninterrupted, tmp_path):
    out = tmp_path / "run"
    kill(demo, out, "rollout", 4, 0.1, "rollout.engine=server")
    run_once(demo, out, "rollout.engine=server")
    counted = {"rollout/engines": 1.0, "rollout/restarts": 0.0, "rollout/redone": 0.0}  # what only a server has to tell
    assert exact(out) == [row | (counted if row["step"] else {}) for row in exact(uninterrupted)]
    assert samples(out) == samples(uninterrupted)


def two_ranks(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """Two tensor-parallel ranks under torchrun."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command, "parallel.tensor=2"], cwd=ROOT,
                          capture_output=True, text=True, timeout=1200, env={**os.environ, **environment})


def kill_rank(demo, run_dir: Path, rank: int, phase: str, visit: int, *more: str) -> None:
    """The job must end with one line of ours that names the rank and the phase, and leave no process behind."""
    before = set(psutil.pids())
    done = two_ranks(str(Path(__file__).with_name("killer.py")), phase, str(visit), "0.02", *arguments(demo, run_dir, *more), KILL_RANK=str(rank))
    assert done.returncode
    lines = [line for line in done.stderr.splitlines() if line.startswith("sophiavl-fast: ")]
    assert len(lines) == 1 and f"rank {rank} (pid " in lines[0] and "ended without a word (killed?), last seen in " in lines[0], done.stderr[-3000:]
    seen = lines[0].partition("last seen in ")[2]
    assert seen.startswith((f"{phase} of step", f"between phases (after {phase})")), lines[0]   # a peer is through with some in no time
    ours = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before and str(demo) in " ".join(p.info["cmdline"] or ())]
    _, alive = psutil.wait_procs(ours, timeout=60)
    assert not alive


@pytest.fixture(scope="module")
def replayed(demo, tmp_path_factory) -> tuple[Path, list[str]]:
    """An uninterrupted run of two ranks on recorded responses, and the settings that it had beside the usual ones."""
    folder = tmp_path_factory.mktemp("replayed")
    run_once(demo, folder / "recorded", "eval.every=0", f"debug.record={folder}/rollouts")
    more = ["eval.every=0", f"debug.replay={folder}/rollouts", "rollout.engine=server", "rollout.max_logprob_diff=null", "policy.control_timeout_s=300"]
    done = two_ranks("-m", "sophiavl_fast", "train", *arguments(demo, folder / "whole", *more))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "whole", more


@pytest.mark.kill
@pytest.mark.layout
@pytest.mark.engine
@pytest.mark.parametrize("rank,phase,visit", [(0, "update", 3), (1, "update", 3), (1, "reward", 4), (0, "transfer", 4), (1, "transfer", 4), (1, "save", 1),
                                              (0, "save", 2), (0, "export", 1), (1, "policy", 1)])
def test_a_killed_rank_of_two(demo, replayed, tmp_path, rank, phase, visit):
    """From replayed responses, so that no engine's start is waited for."""
    whole, more = replayed
    out = tmp_path / "run"
    kill_rank(demo, out, rank, phase, visit, *more)
    done = two_ranks("-m", "sophiavl_fast", "train", *arguments(demo, out, *more))
    assert done.returncode == 0, done.stderr[-3000:]
    same(whole, out)


@pytest.mark.kill
@pytest.mark.layout
@pytest.mark.engine
@pytest.mark.parametrize("rank,visit,background", [(1, 1, "false"), (0, 2, "true"), (1, 2, "true")])
def test_a_killed_rank_of_two_that_save_parts(demo, replayed, tmp_path, rank, visit, background):
    whole, more = replayed
    out, more = tmp_path / "run", [*more, "checkpoint.format=torch_dist", f"checkpoint.background={background}"]
    kill_rank(demo, out, rank, "save", visit, *more)
    done = two_ranks("-m", "sophiavl_fast", "train", *arguments(demo, out, *more))
    assert done.returncode == 0, done.stderr[-3000:]
    same(whole, out)


@pytest.mark.kill
@pytest.mark.layout
@pytest.mark.engine
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_of_two_with_a_real_server(demo, tmp_path, rank):
    """While the lead samples, its peer stands by: the server goes with them."""
    kill_rank(demo, tmp_path / "run", rank, "rollout", 1, "rollout.engine=server", "eval.every=0", "rollout.start_timeout_s=900")


@pytest.mark.engine
def test_a_finished_run_trains_nothing_more_but_its_export_is_made(demo, uninterrupted):
    """As after a kill between the last checkpoint and the export."""
    before = exact(uninterrupted)
    (uninterrupted / "hf" / "model.safetensors").unlink()
    run_once(demo, uninterrupted)
    assert exact(uninterrupted) == before and (uninterrupted / "hf" / "model.safetensors").exists()
