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

from sophiavl_fast.rollout import supervisor
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


def test_a_zombie_is_no_orphan_to_wait_for():
    """A container's first process may never ask for those that it has adopted."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    assert supervisor._group(psutil.Process(process.pid)) == process.pid
    process.kill()
    deadline = time.monotonic() + 20
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert os.getpgid(process.pid) == process.pid and supervisor._group(psutil.Process(process.pid)) == -1
    process.wait()


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


HELPED = ("import ctypes, subprocess, sys, time; run = lambda c: subprocess.Popen([sys.executable, '-c', c]);"
          "worker = run('import ctypes, time; ctypes.CDLL(None).prctl(15, b\"VLLM::Worker\", 0, 0, 0); print(1, flush=True); time.sleep(600)');"
          "helper = run('import time; print(1, flush=True); time.sleep(600)'); time.sleep(600)")


@pytest.fixture
def helped():
    """A supervised server with a worker, by its name, and a helper."""
    supervisor = subprocess.Popen([sys.executable, "-m", "sophiavl_fast.rollout.supervisor", sys.executable, "-c", HELPED],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    assert supervisor.stdout.readline() and supervisor.stdout.readline()
    [server] = psutil.Process(supervisor.pid).children()
    by_role = {p.name() == "VLLM::Worker": p for p in server.children()}
    family = Family(supervisor.pid)
    yield family, by_role[True], by_role[False], server
    family.close()
    end(supervisor)


def test_a_helper_that_ends_ends_no_server(helped):
    """As a compiler that a server has started may, whenever it is done."""
    family, worker, helper, server = helped
    assert family.front == server.pid and helper.pid not in family.roles
    helper.kill()
    assert not family.ended.wait(2)
    worker.kill()
    assert family.ended.wait(20) and family.first == f"engine worker (pid {worker.pid}) ended"


def test_a_killed_server_is_named_and_not_what_it_takes_along(helped):
    family, worker, _, server = helped
    server.kill()
    worker.kill()
    assert family.ended.wait(20) and family.first == f"API server (pid {server.pid}) ended"


def test_a_worker_that_ends_while_the_family_is_looked_at(helped, monkeypatch):
    """It is the first to end, whatever can still be learnt of it."""
    family, worker, *_ = helped
    real = psutil.Process.ppid

    def gone(process):
        if process.pid == worker.pid:
            raise psutil.NoSuchProcess(process.pid)
        return real(process)

    monkeypatch.setattr(psutil.Process, "ppid", gone)
    found = Family(psutil.Process(family.front).parent().pid)
    worker.kill()
    assert found.ended.wait(20) and found.first == f"engine worker (pid {worker.pid}) ended"
    found.close()
