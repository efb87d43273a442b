"""Processes that something else than torchrun started: real ones, that meet over gloo by the variables that every launcher can set."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sophiavl_fast import config
from sophiavl_fast.errors import UserError
from sophiavl_fast.policy.distributed import choose_device, open_layout
from sophiavl_fast.rollout.server import pick_port

ROOT = Path(__file__).resolve().parent.parent.parent
WORKER = """
import os, time, torch, torch.distributed as dist
from sophiavl_fast import config
from sophiavl_fast.policy.distributed import open_layout

late = "LATE" in os.environ
layout = open_layout(config.build({"device": "cpu", "policy": {"control_timeout_s": 3 if late else 60}}, "test"))
if late:
    time.sleep(600 * dist.get_rank())
    layout.wait("the meeting")
total = layout.sum_over_replicas(torch.tensor(10.0 ** dist.get_rank()))
print("found", dist.get_rank(), dist.get_world_size(), layout.replica, layout.replicas, layout.lead, total.item())
layout.close()
"""


def launch(**environment: str) -> subprocess.Popen:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "LOCAL_"))}
    return subprocess.Popen([sys.executable, "-c", WORKER], cwd=ROOT, env={**plain, "OMP_NUM_THREADS": "1", **environment}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_processes_started_by_hand_are_one_run():
    port = str(pick_port(0))
    both = [launch(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(2)]
    for rank, process in enumerate(both):
        out, errors = process.communicate(timeout=300)
        assert f"found {rank} 2 {rank} 2 True 11.0" in out, out + errors[-2000:]


def test_a_rank_that_does_not_come_is_named_by_the_deadline_of_the_config():
    """Not by torch's own of half an hour."""
    port = str(pick_port(0))
    both = [launch(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LATE="1") for rank in range(2)]
    try:
        _, errors = both[0].communicate(timeout=300)
        assert "EngineError: the meeting: a trainer rank did not answer: [Rank 0]: Ranks 1 failed to pass monitoredBarrier in 3000 ms" in errors
    finally:
        both[1].kill()
        both[1].communicate()


def test_a_process_that_cannot_meet_the_others_does_not_stand_alone():
    _, errors = launch(WORLD_SIZE="2", RANK="1", MASTER_ADDR="127.0.0.1").communicate(timeout=300)
    assert "UserError: the environment variable WORLD_SIZE = 2 is set without MASTER_PORT" in errors


def test_a_group_that_was_there_before_is_the_runs(monkeypatch):
    """Such as that of an engine in the same process, of one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="WORLD_SIZE = 2, but the process group that was found has 1 processes"):
            open_layout(config.build({"device": "cpu"}, "test"))
    finally:
        dist.destroy_process_group()


def test_a_rank_of_several_is_told_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match=r"^the environment variable LOCAL_RANK is not set: "):
        choose_device("auto")
    assert choose_device("cpu").type == "cpu"
