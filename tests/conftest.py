"""Before anything that imports torchvision: the hook that lets its CUDA wheel import beside CPU torch. The same examples every time.

Tests that run side by side (`make test`) have cores of their own, and so have the processes they start: two engines that both take all
cores would wait for each other.
"""
import gc
import os
from pathlib import Path

MANY_FILES = 400  # a policy holds some 80 descriptors, its groups' sockets; a shell lets a process have 1,024 in all


def own_cores(cores: list[int], worker: int, workers: int) -> list[int]:
    """This worker's share of the cores; all of them share what is fewer than one each."""
    return cores[worker::workers] or cores


if worker := os.environ.get("PYTEST_XDIST_WORKER", ""):
    os.sched_setaffinity(0, own_cores(sorted(os.sched_getaffinity(0)), int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

import sophiavl_fast  # noqa: E402, F401

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("searching", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))  # HYPOTHESIS_PROFILE=searching draws new ones


@pytest.fixture(autouse=True)
def few_open_files():
    """What earlier tests' policies hold goes with them, and they are in cycles: only a collection ends them."""
    yield
    if len(list(Path("/proc/self/fd").iterdir())) > MANY_FILES:
        gc.collect()


@pytest.fixture
def locked(monkeypatch):
    """What lies in any folder of that name may not be looked at, as ordinary users meet it; tests may run as root, who may all."""
    looked = os.stat

    def stat(path, *args, **kwargs):
        if "locked/" in os.fspath(path):
            raise PermissionError(13, "Permission denied", path)
        return looked(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
