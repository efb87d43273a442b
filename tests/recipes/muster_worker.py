"""A rank that does nothing but be somewhere: python muster_worker.py FOLDER DEADLINE_S DEED DOER. The DOER does its DEED in `update` of step 3;
the deed `early` is a kill that the other rank learns of before it has joined."""
import json
import os
import signal
import sys
import time
from pathlib import Path

from sophiavl_fast.errors import EngineError
from sophiavl_fast.recipes.muster import Muster, before_it

folder, deadline, deed, doer = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3], int(sys.argv[4])
DEEDS = {"kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
         "nothing": lambda: time.sleep(600)}


def fail():
    raise EngineError("the wheel came off")


def doer_fell() -> bool:
    note = folder / "ranks" / f"rank-{doer}.json"
    return note.exists() and json.loads(note.read_text())["phase"] == "update"


before_it()
if deed == "early" and int(os.environ["RANK"]) != doer:
    while not doer_fell():
        time.sleep(0.05)
    time.sleep(3)           # in which torchrun ends the job
with Muster(folder, deadline) as muster:
    with muster.phase("rollout", 3):
        pass
    if deed == "early" and muster.rank == doer:
        with muster.phase("update", 3):
            DEEDS["kill"]()
    (folder / f"pid-{muster.rank}").write_text(str(os.getpid()))
    while len(list(folder.glob("pid-*"))) < muster.size:
        time.sleep(0.05)
    if muster.rank == doer:
        with muster.phase("update", 3):
            DEEDS.get(deed, fail)()
    with muster.phase("reward", 3):
        time.sleep(600)          # in C, as in a collective: only the thread can act
