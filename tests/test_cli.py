"""Bad input through the command line: one clear line on stderr, exit code 2, no traceback, nothing left behind."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
GOOD = {"problem_id": 0, "problem": "sum?", "data_type": "image", "problem_type": "numerical", "options": [], "process": "",
        "solution": "<answer>3</answer>", "path": "a.png", "data_source": "t"}


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "sophiavl_fast", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, **environment})


def refused(done: subprocess.CompletedProcess, *expected: str) -> None:
    said = [line for line in done.stderr.splitlines() if line.startswith("sophiavl-fast")]
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(said) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    for words in expected:
        assert words in said[0], said[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from sophiavl_fast.data.demo import tiny_model

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model.build(folder, 0)
    return folder


@pytest.fixture
def train(tmp_path, model):
    """Runs `train` on one record changed by `change`, with a good picture beside it."""
    def run(change: dict | None = None, *overrides: str, registry: dict | None = None, **environment: str) -> subprocess.CompletedProcess:
        (tmp_path / "images").mkdir(exist_ok=True)
        if not (tmp_path / "images" / "a.png").exists():
            Image.new("RGB", (84, 28)).save(tmp_path / "images" / "a.png")
        record = {k: v for k, v in (GOOD | (change or {})).items() if v is not None}
        (tmp_path / "set.jsonl").write_text(json.dumps(GOOD | {"problem_id": 1}) + "\n" + json.dumps(record) + "\n")
        entry = {"file_path": "set.jsonl", "image_base_path": "images", "template": "plain"}
        (tmp_path / "registry.json").write_text(json.dumps(registry or {"mine": entry}))
        return cli("train", "configs/demo.yaml", f"data.registry={tmp_path}/registry.json", "data.train=mine", "eval.every=0", f"run.dir={tmp_path}/run",
                   f"model.path={model}", "thinking.backend=off", "run.steps=1", "rollout.prompts_per_step=2", "rollout.n=2", *overrides, **environment)
    return run


def test_missing_dataset_names_a_neighbour(train):
    refused(train(None, "data.train=mime"), "'mime'", "mine")


def test_missing_image(train):
    refused(train({"path": "b.png"}), "set.jsonl:2", "b.png")


def test_corrupt_image(train, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    refused(train({"path": "broken.png"}), "set.jsonl:2", "broken.png")


def test_record_without_solution(train):
    refused(train({"solution": None}), "set.jsonl:2", "solution")


def test_unknown_problem_type(train):
    refused(train({"problem_type": "numercal"}), "set.jsonl:2", "numercal", "numerical")


def test_image_path_leaves_its_folder(train):
    refused(train({"path": "../registry.json"}), "set.jsonl:2", "../registry.json")


def test_image_from_a_url_is_not_fetched(train):
    refused(train({"path": "http://127.0.0.1:9/a.png"}), "set.jsonl:2", "http://127.0.0.1:9/a.png")


def test_unknown_key(train):
    refused(train(None, "rollout.temprature=1"), "rollout.temprature", "did you mean 'rollout.temperature'")


def test_batch_sizes_that_do_not_divide(train):
    refused(train(None, "rollout.prompts_per_step=3", "algorithm.mini_batches=2"), "rollout.prompts_per_step = 3", "algorithm.mini_batches = 2")


def test_missing_model(train, tmp_path):
    refused(train(None, f"model.path={tmp_path}/nowhere"), "nowhere")


def test_reward_endpoint_down(train):
    refused(train(None, "thinking.backend=endpoint", "thinking.url=http://127.0.0.1:9/v1", "thinking.model=judge", "thinking.on_error=fail"), "127.0.0.1:9")


def test_vllm_not_installed(train, tmp_path):
    """A folder first on the path in which vLLM cannot be found, as on a machine without it."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(
        "import sys, importlib.abc\n"
        "class Hide(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'vllm':\n            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hide())\n")
    refused(train(None, PYTHONPATH=str(tmp_path / "hidden")), "vLLM")


@pytest.mark.engine
def test_port_taken(train):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(train(None, "rollout.engine=server", f"rollout.port={port}"), str(port))


def test_checkpoint_of_another_model(train, tmp_path, model):
    from sophiavl_fast import config as tree
    from sophiavl_fast.policy import Policy, checkpoint

    config = tree.build({"device": "cpu", "model": {"path": str(model), "dtype": "bfloat16"}}, "test")
    policy = Policy.create(config, reference=False, total_steps=1)
    checkpoint.save(policy, tmp_path / "run", 1, {"step": 1, "seed": 0}, keep=1)
    policy.close()
    refused(train(), "checkpoint", "another model", "model.dtype")


def test_no_command_and_help():
    assert cli().returncode == 2
    for command in ("train", "evaluate", "infer", "export", "report", "doctor", "data"):
        done = cli(command, "--help")
        assert done.returncode == 0 and "usage" in done.stdout


@pytest.mark.parametrize("arguments,expected", [
    (("report", "nowhere"), "nowhere"),
    (("export", "nowhere", "out"), "nowhere"),
    (("train", "nowhere.yaml"), "nowhere.yaml"),
    (("data", "check", "nothing"), "nothing"),
    (("evaluate", "--model", "m", "--data", "d", "--out", "no/such/folder/x.json"), "no/such/folder"),
    (("infer", "--model", "nowhere", "what?"), "nowhere"),
])
def test_commands_refuse_in_one_line(arguments, expected):
    refused(cli(*arguments), expected)
