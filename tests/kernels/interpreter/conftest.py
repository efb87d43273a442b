"""Triton's kernels interpreted on a CPU. `TRITON_INTERPRET=1 pytest tests/kernels/interpreter`, in a process of its own.

Triton reads the variable when it is imported, and kernels decorated without it cannot be interpreted, nor the other way
round; so without the variable this folder collects nothing. What the interpreter gets wrong is cured by kernels/ops/triton_interpreter.py.
"""
from __future__ import annotations

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    from sophiavl_fast.kernels.triton_interpreter import cure

    cure()  # for the tests that launch a kernel themselves; the ops' launches see to it


def pytest_report_header():
    return None if INTERPRETED else "tests/kernels/interpreter: nothing collected, it needs TRITON_INTERPRET=1 from the start"


@pytest.fixture(autouse=True)
def _one_thread():
    """The interpreter is numpy in a loop: threads of torch only get in its way."""
    import torch

    torch.set_num_threads(1)
