"""Environment variables of the engines, for a child process and for the trainer's own process.

Only what the engine needs and the user has not set: a variable found in the environment wins.
"""
from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from sophiavl_fast.compat.orphans import SERVED

COMPAT_SITE = Path(__file__).parent.parent / "compat" / "site"


def resolve_device(device: str | torch.device) -> str:
    """cpu or cuda; `auto` is cuda where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device).type


def engine_variables(device: str) -> dict[str, str]:
    """What every engine of ours runs with."""
    common = {"VLLM_NO_USAGE_STATS": "1", "VLLM_USE_V2_MODEL_RUNNER": "0" if device == "cpu" else "1"}
    if device != "cpu":
        # its fp32 attention multiplies by tl.dot without a precision, which Triton reads as TF32: log-probs off by 3e-3; 16-bit operands are not concerned
        return common | {"TRITON_F32_DEFAULT": "ieee"}
    return common | {
        "VLLM_CPU_CI_ENV": "1",                        # no warm-up passes: requests warm it up
        "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1",    # its libraries are CUDA builds
    }


def child_environment(device: str, parent: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of a spawned server; `extra` (token and the like) wins over everything."""
    env = engine_variables(device) | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "INFO"} | dict(parent) | {SERVED: "1"}
    env["PYTHONPATH"] = with_compat_site(parent.get("PYTHONPATH"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK"):
        env.pop(name, None)                            # torchrun's: the engine is no rank of the trainer
    if device == "cpu":
        env.setdefault("TORCHDYNAMO_DISABLE", "1")     # or the first request for log-probs compiles for 20 s
        env.pop("OMP_NUM_THREADS", None)               # torchrun sets 1, the engine counts cores itself
    return env | dict(extra)


@contextmanager
def inline_environment(device: str) -> Iterator[None]:
    """Around import and start of an engine inside this process.

    What vLLM reads at any time stays set. TORCHDYNAMO_DISABLE is read when functions are decorated, so it is set for
    the start only: torch.compile of the trainer's own code keeps working. PYTHONPATH is for the child in which vLLM
    inspects a model's class (the first time in a home folder; later it finds the answer in its cache).
    """
    lasting = engine_variables(device) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    for name, value in lasting.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    passing = {"PYTHONPATH": with_compat_site(os.environ.get("PYTHONPATH"))} | ({"TORCHDYNAMO_DISABLE": "1"} if device == "cpu" else {})
    before = {name: os.environ.get(name) for name in passing}
    os.environ.update(passing)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                del os.environ[name]
            else:
                os.environ[name] = old


def with_compat_site(path: str | None) -> str:
    """A child's PYTHONPATH: the folder of our sitecustomize, then what was there."""
    return os.pathsep.join([str(COMPAT_SITE), *filter(None, [path])])
