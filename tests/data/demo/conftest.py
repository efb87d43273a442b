"""One small copy of the demo's data and its tiny model for the whole room."""
import json
from pathlib import Path

import pytest

from sophiavl_fast.data.demo import generate, questions, tiny_model


def quiet(rows, label, total):
    return rows


def write(folder: Path, seed: int = 0) -> Path:
    generate.write(folder, seed, quiet, scale=0.03)
    return folder


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def asked(kind: str, digits) -> questions.Question:
    return questions.Question(kind, tuple(digits))


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    return write(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.build(folder, seed=0)
    return folder
