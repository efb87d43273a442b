"""When one rank of a job falls: one line that names it and its phase, and nobody is left."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sophiavl_fast.recipes import muster
from sophiavl_fast.rollout.server import pick_port
from tests.recipes.conftest import ROOT

WORKER = Path(__file__).with_name("muster_worker.py")


def start(folder: Path, deed: str, doer: int, deadline: float = 600.0, meeting: tuple[str, ...] = ("--standalone",)) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc-per-node", "2", str(WORKER), str(folder), str(deadline),
                             deed, str(doer)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def ranks(folder: Path) -> list[psutil.Process]:
    """Both processes, once they are at their places."""
    until = time.monotonic() + 120
    while len(found := [f for f in sorted(folder.glob("pid-*")) if f.read_text()]) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    return [psutil.Process(int(f.read_text())) for f in found]


def end_of(job: subprocess.Popen) -> list[str]:
    """Our own lines of a job that fails."""
    output, _ = job.communicate(timeout=240)
    assert job.returncode, output
    return [line for line in output.splitlines() if line.startswith("sophiavl-fast:")]


@pytest.mark.parametrize("deed, doer, line", [
    ("kill", 0, "ended without a word (killed?), last seen in update of step 3;"),
    ("kill", 1, "ended without a word (killed?), last seen in update of step 3;"),
    ("raise", 1, "failed in update of step 3: EngineError: the wheel came off;"),
    pytest.param("stop", 0, "is silent, last seen in update of step 3;", marks=pytest.mark.kill)])
def test_one_line_names_the_rank_and_its_phase(tmp_path, deed, doer, line):
    job = start(tmp_path, deed, doer, deadline=10.0 if deed == "stop" else 600.0)
    try:
        processes = ranks(tmp_path)
    except psutil.NoSuchProcess:
        processes = []                     # has fallen already
    lines = end_of(job)
    assert len(lines) == 1 and f"rank {doer} (pid " in lines[0] and line in lines[0], lines
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


def test_a_second_attempt_at_the_same_port_has_its_own_line(tmp_path):
    """Nothing but the time tells the attempts apart; the first one's notes name a culprit that the second's must not."""
    meeting = ("--master-addr", "127.0.0.1", "--master-port", str(pick_port(0)))
    for doer in (1, 0):
        lines = end_of(start(tmp_path, "raise", doer, meeting=meeting))
        assert len(lines) == 1 and f"rank {doer} (pid " in lines[0] and "the wheel came off" in lines[0], lines
        time.sleep(muster.CLOCKS_S)


def test_a_rank_that_falls_before_the_other_has_joined_is_told_of(tmp_path):
    """The other is still importing when torchrun ends it."""
    lines = end_of(start(tmp_path, "early", 1))
    assert len(lines) == 1 and "rank 1 (pid " in lines[0] and "ended without a word (killed?), last seen in update of step 3;" in lines[0], lines


@pytest.mark.parametrize("number, line", [
    (signal.SIGKILL, "the launcher (pid {}, torchrun or another) ended without a word (killed?); rank "),
    (signal.SIGTERM, "SIGTERM from the launcher (pid {}), which was told to end (scancel, a time limit) or saw another node fail; rank ")])
def test_without_their_launcher_they_end(tmp_path, number, line):
    job = start(tmp_path, "nothing", 1)
    processes = ranks(tmp_path)
    time.sleep(1)
    job.send_signal(number)
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
    lines = end_of(job)
    assert len(lines) == 1 and line.format(job.pid) in lines[0] and " of step 3; the job ends" in lines[0], lines


def refuse(tmp_path: Path, first: str, second: str) -> list[str]:
    """Our own lines of a `train` whose first and second rank get these overrides."""
    from sophiavl_fast.data.demo import tiny_model

    tiny_model.build(tmp_path / "tiny", 0)
    record = {"problem_id": 0, "problem": "sum?", "problem_type": "numerical", "solution": "<answer>3</answer>", "path": ""}
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(record | {"problem_id": i}) + "\n" for i in range(8)))
    (tmp_path / "registry.json").write_text(json.dumps({"mine": {"file_path": "set.jsonl"}}))
    command = (f"exec {sys.executable} -m sophiavl_fast train configs/demo.yaml device=cpu rollout.engine=server thinking.backend=off eval.every=0 "
               f"data.train=mine data.registry={tmp_path}/registry.json run.dir={tmp_path}/run model.path={tmp_path}/tiny")
    script = tmp_path / "train.sh"
    script.write_text(f'cd {ROOT}\n[ "$RANK" = 1 ] && set -- {second} || set -- {first}\n{command} "$@"\n')
    job = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", "bash", str(script)],
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return end_of(job)


@pytest.mark.parametrize("fault, words", [("run.resume=nowhere", "run.resume = 'nowhere'"), ("memory.fraction=1e-9", "does not fit"),
                                          ("rollot.n=2", "had not joined the run")])
def test_bad_input_of_a_later_rank_alone_is_told_once(tmp_path, fault, words):
    """Such as a folder that is missing on its node: before it has joined, and before its run.dir is known."""
    lines = refuse(tmp_path, "", fault)
    assert len(lines) == 1 and lines[0].startswith("sophiavl-fast: rank 1 ") and words in lines[0], lines


def test_bad_input_of_all_ranks_is_told_by_the_first(tmp_path):
    lines = refuse(tmp_path, "run.resume=nowhere", "run.resume=nowhere")
    assert len(lines) == 1 and lines[0].startswith("sophiavl-fast: run.resume = 'nowhere'"), lines
