from __future__ import annotations

import pytest

from tests.rollout import tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def model(folder):
    return tiny.load(folder)


@pytest.fixture(scope="session")
def prompts(folder):
    return tiny.prompts(folder)
