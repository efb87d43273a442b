"""When one rank of a job falls: one line that names it and its phase, and nobody is left."""
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


def test_without_their_launcher_they_end(tmp_path):
    job = start(tmp_path, "nothing", 1)
    processes = ranks(tmp_path)
    job.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
    job.communicate(timeout=60)
