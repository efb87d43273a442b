"""Runs `train`, but ends itself by SIGKILL inside the n-th visit of a phase: python killer.py PHASE VISIT DELAY_S CONFIG a.b=value ...

Under torchrun the rank of the environment variable KILL_RANK does.
"""
import os
import signal
import sys
import threading
from contextlib import contextmanager

from sophiavl_fast import cli
from sophiavl_fast.monitor import progress

phase, visit, delay, *arguments = sys.argv[1:]
visits = 0
plain = progress.Progress.phase


@contextmanager
def deadly(self, name):
    global visits
    visits += name == phase
    if name == phase and visits == int(visit) and os.environ.get("RANK", "") == os.environ.get("KILL_RANK", ""):
        threading.Timer(float(delay), os.kill, (os.getpid(), signal.SIGKILL)).start()
    with plain(self, name) as timer:
        yield timer


progress.Progress.phase = deadly

if __name__ == "__main__":
    sys.exit(cli.main(["train", *arguments]))
