"""Processes of a server end with the one that started them, however that ends; nobody else's do."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sophiavl_fast.compat.orphans import SERVED
from sophiavl_fast.rollout.environment import with_compat_site

ROOT = Path(__file__).parent.parent.parent
PARENT = '''
import multiprocessing, sys, threading, time

def child(pipe):
    pipe.send(multiprocessing.current_process().pid)
    time.sleep(600)

if __name__ == "__main__":
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context(sys.argv[1]).Process(target=child, args=(theirs,))
    if sys.argv[2] == "passing":
        begun, enough = threading.Event(), threading.Event()
        thread = threading.Thread(target=lambda: (process.start(), begun.set(), enough.wait()))
        thread.start()
        begun.wait()
    else:
        process.start()
    theirs.close()
    pid = ours.recv()
    if sys.argv[2] == "passing":
        enough.set()
        thread.join()
    print(pid, flush=True)
    time.sleep(600)
'''


@pytest.fixture
def start(tmp_path):
    begun = []

    def run(method: str, thread: str = "main", **extra: str) -> tuple[subprocess.Popen, psutil.Process]:
        (tmp_path / "parent.py").write_text(PARENT)
        environment = os.environ | {"PYTHONPATH": with_compat_site(str(ROOT))} | extra
        parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py"), method, thread], env=environment, stdout=subprocess.PIPE, text=True)
        child = psutil.Process(int(parent.stdout.readline()))
        begun.extend([psutil.Process(parent.pid), child])
        return parent, child

    yield run
    for process in begun:
        if process.is_running():
            process.kill()


def lives(process: psutil.Process, seconds: float) -> bool:
    """Still after so many seconds, and not only as the zombie of a parent that does not ask for it."""
    return bool(psutil.wait_procs([process], timeout=seconds)[1]) and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_servers_processes_end_with_their_parent(start, method):
    parent, child = start(method, **{SERVED: "1"})
    parent.kill()
    parent.wait()
    assert not lives(child, 20)


def test_those_of_others_do_not(start):
    parent, child = start("fork")
    parent.kill()
    parent.wait()
    assert lives(child, 1)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_does_not_end_with_the_thread_that_started_it(start, method):
    _, child = start(method, "passing", **{SERVED: "1"})
    assert lives(child, 1)
