"""No orphans: whatever ends the trainer, the supervisor ends the server's whole family."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sophiavl_fast.rollout.family import Family
from sophiavl_fast.rollout.server import end

ROOT = Path(__file__).parent.parent.parent
# A stand-in server that behaves like vLLM at its worst: a child in a session of its own which ignores SIGTERM, and outlives it.
SERVER = ("import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
          "subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'],"
          " start_new_session=True); print(os.getpid(), flush=True); time.sleep(600)")
# A trainer; the forked child holds a copy of the pipe's end, as grader workers do.
TRAINER = ("import os, subprocess, sys, time;"
           "s = subprocess.Popen([sys.executable, '-m', 'sophiavl_fast.rollout.supervisor', sys.executable, '-c', sys.argv[1]],"
           " stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True);"
           "line = s.stdout.readline().decode(); child = os.fork(); child and print(s.pid, line, flush=True); time.sleep(600)")


@pytest.fixture
def trainer():
    process = subprocess.Popen([sys.executable, "-c", TRAINER, SERVER], stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    supervisor, server = (psutil.Process(int(p)) for p in process.stdout.readline().split())
    deadline = time.monotonic() + 20
    while len(family := [supervisor, *supervisor.children(recursive=True)]) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(family) == 3
    yield process, server, family
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_sigkill_of_the_trainer_leaves_nothing(trainer):
    process, _, family = trainer
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


def test_sigkill_of_the_server_leaves_nothing(trainer):
    _, server, family = trainer
    server.kill()
    _, alive = psutil.wait_procs(family[1:], timeout=30)
    assert not alive


def test_sigterm_of_the_supervisor_leaves_nothing(trainer):
    _, _, family = trainer
    family[0].terminate()
    _, alive = psutil.wait_procs(family[1:], timeout=30)
    assert not alive


def test_what_a_killed_supervisor_leaves_is_ended_with_the_server():
    """A child in the supervisor's process group, as vLLM's are, which no signal of the kernel has reached."""
    server = ("import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); print(0, flush=True); time.sleep(600)")
    supervisor = subprocess.Popen([sys.executable, "-m", "sophiavl_fast.rollout.supervisor", sys.executable, "-c", server],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    assert supervisor.stdout.readline()
    family = psutil.Process(supervisor.pid).children(recursive=True)
    assert len(family) == 2
    supervisor.kill()
    supervisor.wait()
    end(supervisor)
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive


def test_shared_memory_of_a_killed_server_is_given_back():
    """As that of vLLM's message queues: the tracker, which would unlink it, is killed last."""
    server = ("import signal, time; from multiprocessing.shared_memory import SharedMemory; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
              "kept = SharedMemory(create=True, size=1 << 16); print(kept.name, flush=True); time.sleep(600)")
    supervisor = subprocess.Popen([sys.executable, "-m", "sophiavl_fast.rollout.supervisor", sys.executable, "-c", server],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    place = Path("/dev/shm") / supervisor.stdout.readline().strip()
    family = psutil.Process(supervisor.pid).children(recursive=True)
    assert place.exists() and len(family) == 2      # the server and its tracker
    supervisor.stdin.close()
    assert supervisor.wait(timeout=30) == 0
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive and not place.exists()


@pytest.mark.kill
@pytest.mark.engine
@pytest.mark.parametrize("after", ["ready", "starting"])
def test_sigkill_of_a_trainer_with_a_real_server(folder, tmp_path, after):
    code = ("import sys, pathlib; from tests.rollout.host import open_engine; import sophiavl_fast.rollout.server as s;"
            "p = lambda *a, **k: (print('starting', flush=True), w(*a, **k), print('ready', flush=True)); w = s.Server.wait_ready;"
            "s.Server.wait_ready = p; open_engine(pathlib.Path(sys.argv[1]), sys.argv[2], engine='server'); import time; time.sleep(600)")
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    for line in process.stdout:
        if line.strip() == after:
            break
    if after == "starting":
        time.sleep(8)                # somewhere in its imports
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=40)
    assert not alive


def test_a_helper_that_ends_while_the_family_is_looked_at(monkeypatch):
    """As a compiler that a server has started may: it is the first to end, and no error of the start."""
    code = "import subprocess, sys, time; c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); print(0, flush=True); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline()
    [child] = psutil.Process(parent.pid).children()

    def gone(process):
        raise psutil.NoSuchProcess(process.pid)

    monkeypatch.setattr(psutil.Process, "ppid", gone)
    monkeypatch.setattr(psutil.Process, "children", lambda *_, **__: [child])
    found = Family(parent.pid)
    os.kill(child.pid, signal.SIGKILL)
    try:
        assert found.ended.wait(20) and f"(pid {child.pid}) ended" in found.first
    finally:
        found.close()
        parent.kill()
        parent.wait()
