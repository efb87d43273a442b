import os
import sys
from pathlib import Path

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import spoilt
import tiny
import torch

from sophiavl_fast.policy import Policy

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("tiny") / "untied")


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("tiny") / "tied", tied=True, seed=1)


@pytest.fixture
def create():
    """Policies one after the other: megatron's parallel state is one a process, so opening one closes the last."""
    opened = []

    def open_policy(folder, *, banned_ids=(), temperature=1.0, reference=False, total_steps=10, trained=True, **sections):
        while opened:
            opened.pop().close()
        policy = Policy.create(tiny.config(folder, **sections), banned_ids=banned_ids, temperature=temperature, reference=reference,
                               total_steps=total_steps, trained=trained)
        opened.append(policy)
        return policy

    yield open_policy
    while opened:
        opened.pop().close()


@pytest.fixture
def saved(create, folder, tmp_path):
    """saved(format) -> a policy and the second of its two checkpoints, to be spoilt."""
    return lambda form: spoilt.two_checkpoints(create, folder, tmp_path, form)
