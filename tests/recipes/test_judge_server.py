"""thinking.serve: the run starts its own judge, gets from it what the same model says in-process, and ends with it."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import correlation

import psutil
import pytest

from sophiavl_fast import config
from sophiavl_fast.errors import UserError
from tests.recipes.conftest import ROOT, run

SERVED = ["thinking.backend=endpoint", "thinking.serve=true", "thinking.on_error=fail", "eval.every=0", "checkpoint.every=0"]


def judged(run_dir: Path) -> list[tuple]:
    return [(r["response"], r["thinking"]) for r in map(json.loads, (run_dir / "samples.jsonl").read_text().splitlines()) if r["step"] == 1]


def servers(mark: str) -> list[psutil.Process]:
    """vLLM's processes and their supervisors that descend from a run with this mark in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEST_MARK") == mark and any("vllm" in part.lower() or "supervisor" in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.engine
def test_a_run_serves_its_judge_and_hears_what_the_model_says(rl, tmp_path):
    """Sleep included: on a CPU vLLM takes both calls and has nothing to give up."""
    run(*rl(tmp_path / "local" / "run", "run.steps=1", "eval.every=0", "checkpoint.every=0"))
    run(*rl(tmp_path / "served" / "run", *SERVED, "thinking.sleep=true", "run.steps=2"), TEST_MARK=str(tmp_path))
    local, served = judged(tmp_path / "local" / "run"), judged(tmp_path / "served" / "run")
    assert [text for text, _ in served] == [text for text, _ in local] and len({score for _, score in local}) > 3
    # twenty steps have not taught it to finish its numbers: in-process every score's whole text counts, over HTTP what the reply's own tokens show, and
    # a reply without a number is no score
    both = [(a, b) for (_, a), (_, b) in zip(served, local, strict=True) if a is not None and b is not None]
    assert len(both) >= 0.8 * len(local)
    assert correlation(*map(list, zip(*both))) > 0.8
    assert not servers(str(tmp_path))


@pytest.mark.engine
@pytest.mark.slow
def test_a_judge_that_ends_ends_the_run_whatever_on_error_says(rl, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-m", "sophiavl_fast", *rl(out, *SERVED, "thinking.on_error=drop", "run.steps=500")], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TEST_MARK": str(tmp_path)})
    deadline = time.monotonic() + 300
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-2000:]
        time.sleep(0.2)
    (judge,) = (p for p in servers(str(tmp_path)) if "vllm.entrypoints.openai.api_server" in p.cmdline() and not any("supervisor" in x for x in p.cmdline()))
    judge.kill()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1
    assert said.count("sophiavl-fast: ") == 1 and "judge server http://127.0.0.1:" in said and "ended during scoring" in said and "judge.log" in said
    _, alive = psutil.wait_procs(servers(str(tmp_path)), timeout=30)
    assert not alive


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.layout
def test_two_replicas_ask_one_judge(rl, tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sophiavl_fast",
                           *rl(tmp_path / "run", *SERVED, "thinking.sleep=true", "run.steps=2", "rollout.engine=server",
                               "rollout.start_timeout_s=600")], cwd=ROOT, capture_output=True, text=True, timeout=1500,
                          env={**os.environ, "TEST_MARK": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 6 * 5 and all(row["thinking"] is not None for row in rows)
    assert not servers(str(tmp_path))


@pytest.mark.parametrize("wishes,expected", [
    (["thinking.serve=true", "thinking.path={here}/judge"], "needs thinking.backend: endpoint"),
    (["thinking.backend=endpoint", "thinking.serve=true", "thinking.url=http://h/v1"], "leave one of them out"),
    (["thinking.backend=endpoint", "thinking.serve=true"], "needs thinking.path"),
    (["thinking.backend=endpoint", "thinking.serve=true", "thinking.path={here}/jugde"], "no model folder (no config.json); did you mean '{here}/judge'"),
    (["thinking.backend=endpoint", "thinking.serve=true", "thinking.path={here}/judge", "thinking.gpus=[1,1]"], "name different GPUs"),
    (["thinking.backend=endpoint", "thinking.serve=true", "thinking.path={here}/judge", "thinking.sleep=true", "rollout.staleness=1",
      "rollout.engine=server"], "never idle"),
    (["thinking.backend=endpoint", "thinking.serve=true", "thinking.path={here}/judge", "thinking.sleep=true", "thinking.gpus=[1]"], "nobody waits"),
    (["thinking.backend=endpoint", "thinking.url=http://h/v1", "thinking.model=m", "thinking.sleep=true"], "needs thinking.serve: true"),
    (["thinking.backend=endpoint", "thinking.serve=true", "thinking.path={here}/judge", "thinking.gpu_memory=1.5"], "must lie in (0, 1]"),
])
def test_what_cannot_be_served_is_refused_before_anything_loads(tmp_path, wishes, expected):
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        config.load(ROOT / "configs/demo.yaml", ["thinking.path=''", *(wish.format(here=tmp_path) for wish in wishes)],
                    environ={"OPENAI_API_URL": "http://somewhere/v1"})
    assert expected.format(here=tmp_path) in str(caught.value)


def test_the_environment_names_no_other_judge(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    found = config.load(ROOT / "configs/demo.yaml", ["thinking.backend=endpoint", "thinking.serve=true", f"thinking.path={tmp_path}"],
                        environ={"OPENAI_API_URL": "http://somewhere/v1", "REWARD_MODEL": "theirs"})
    assert (found.thinking.url, found.thinking.model) == ("", "thinking-reward-model")
