"""Recorded rollouts: the whole recipe in other layouts must make the same metrics of the same responses."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes.conftest import ROOT, run

pytestmark = pytest.mark.engine
# what a layout may not change; times, rates, memory and learning-rate-free counters aside
COMPARED = {"loss", "reward/total", "reward/outcome", "reward/thinking", "trust/gamma", "trust/uniform_share", "policy/kl_ref", "policy/clip_frac",
            "policy/entropy", "policy/grad_norm", "response/tokens"}
DRIFT = "rollout/logprob_diff_mean"   # from what was recorded: in a replay, how far Adam carried another order of summation (2.6e-5 where measured)


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "sophiavl_fast",
                           *arguments], cwd=ROOT, capture_output=True, text=True, timeout=540)


@pytest.fixture(scope="module")
def recorded(demo, tmp_path_factory) -> Path:
    """A run of 20 steps in one process, its responses under rollouts/."""
    out = tmp_path_factory.mktemp("recorded") / "run"
    run(*arguments(demo, out, f"debug.record={out}/rollouts"))
    return out


def arguments(demo: Path, run_dir: Path, *more: str) -> list[str]:
    return ["train", "configs/demo.yaml", f"data.registry={demo}/data/dataset_info.json", f"run.dir={run_dir}", f"model.path={demo}/warm",
            f"thinking.path={demo}/judge", "run.steps=20", "rollout.prompts_per_step=4", "rollout.n=4", "eval.every=0", "checkpoint.every=0",
            "algorithm.kl_coef=0.04", "monitor.tensorboard=false",
            "rollout.max_logprob_diff=1.0e-2",  # 20 steps of Adam make 2e-4 of another order of summation
            *more]


@pytest.mark.layout
@pytest.mark.parametrize("processes, layout", [
    (1, []), (2, ["parallel.tensor=2", "parallel.sequence=true"]), (2, ["parallel.data=2"]),
    pytest.param(2, ["parallel.pipeline=2"], marks=pytest.mark.slow),
    pytest.param(4, ["parallel.tensor=2", "parallel.data=2"], marks=pytest.mark.slow)], ids=lambda v: ",".join(v) if isinstance(v, list) else str(v))
def test_the_same_responses_give_the_same_20_steps(demo, recorded, tmp_path, processes, layout):
    done = torchrun(processes, *arguments(demo, tmp_path / "run", f"debug.replay={recorded}/rollouts", "rollout.engine=server", *layout))
    assert done.returncode == 0, done.stderr[-3000:]
    alone, found = metrics(recorded), metrics(tmp_path / "run")
    assert [m["step"] for m in found] == list(range(1, 21))
    for a, b in zip(alone, found, strict=True):
        want = {k: a[k] for k in COMPARED if a[k] is not None}  # null: nothing defined it, such as gamma where no group was mixed
        assert {k for k in COMPARED if b[k] is None} == COMPARED - want.keys()
        assert {k: b[k] for k in want} == pytest.approx(want, rel=1e-3, abs=2e-5), f"step {a['step']}"
        assert b[DRIFT] < (1e-6 if a["step"] == 1 else 1e-4), f"step {a['step']}"
    assert alone[0]["policy/grad_norm"] != alone[1]["policy/grad_norm"]


@pytest.mark.layout
@pytest.mark.parametrize("first, then", [pytest.param(1, 2, marks=pytest.mark.slow), (2, 1)], ids=str)
def test_another_number_of_replicas_goes_on_where_a_run_stopped(demo, recorded, tmp_path, first, then):
    """Replays refuse prompts that the recording run did not draw at that step: the same samples, none twice, none lost."""
    form = "torch_dist" if first > then else "safetensors"

    def go(replicas):
        done = torchrun(replicas, *arguments(demo, tmp_path / "run", f"debug.replay={recorded}/rollouts", "rollout.engine=server", "checkpoint.every=4",
                                             f"checkpoint.format={form}", f"parallel.data={replicas}", "run.steps=8", "trust.anneal_steps=20"))
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]

    whole = go(first)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_8")
    resumed = go(then)
    assert [(r["step"], r["id"], r["response"]) for r in resumed] == [(r["step"], r["id"], r["response"]) for r in whole]
    assert len(resumed) == 8 * 16
    for a, b in zip(metrics(recorded), metrics(tmp_path / "run"), strict=False):
        assert {k: b[k] for k in COMPARED if a[k] is not None} == pytest.approx({k: a[k] for k in COMPARED if a[k] is not None}, rel=1e-3, abs=2e-5)
    assert [m["step"] for m in metrics(tmp_path / "run")] == list(range(1, 9))


def test_rollout_only_leaves_the_weights(demo, tmp_path):
    from safetensors.torch import load_file

    run(*arguments(demo, tmp_path / "run", "debug.rollout_only=true", "run.steps=2"))
    before, after = (load_file(folder / "model.safetensors") for folder in (demo / "warm", tmp_path / "run" / "hf"))
    assert before.keys() == after.keys() and all((before[k] == after[k]).all() for k in before)
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 32


def test_another_seed_is_not_a_replay(demo, recorded, tmp_path):
    done = run(*arguments(demo, tmp_path / "run", f"debug.replay={recorded}/rollouts", "run.seed=5"), check=False)
    assert done.returncode == 2
    assert "debug.replay" in done.stderr and "run.seed" in done.stderr and "Traceback" not in done.stderr
