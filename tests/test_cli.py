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


def said(capsys, *arguments: str) -> str:
    """The one line of a command that must end with exit code 2."""
    from sophiavl_fast.cli import main

    try:
        code = main(arguments)
    except SystemExit as error:     # argparse's way out
        code = error.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("sophiavl-fast"), (code, lines)
    return lines[0]


EVALUATE = ("evaluate", "--model", "m", "--data", "d", "--out", "x.json")
ASK = ("--input", "i", "--out", "o", "--url", "http://h", "--model", "m")


@pytest.mark.parametrize("arguments,expected", [
    ((*EVALUATE, "--limit", "-1"), "argument --limit: -1: must be at least 1"),
    ((*EVALUATE, "--limit", "0"), "argument --limit: 0: must be at least 1"),
    ((*EVALUATE, "--limit", "some"), "argument --limit: 'some': expected a whole number"),
    ((*EVALUATE, "--max-new-tokens", "0"), "argument --max-new-tokens: 0: must be at least 1"),
    ((*EVALUATE, "--max-new-tokens", "-3"), "-3: must be at least 1"),
    ((*EVALUATE, "--max-new-tokens", "9" * 30), "less than 2^31"),
    (("infer", "--model", "m", "--max-new-tokens", "0", "what?"), "argument --max-new-tokens: 0: must be at least 1"),
    (("infer", "--model", "m", ""), "the question is empty"),
    (("infer", "--model", "m", " \n"), "the question is empty"),
    (("reward", "annotate", *ASK, "--concurrency", "0"), "argument --concurrency: 0: must be at least 1"),
    (("reward", "annotate", *ASK, "--timeout", "-1"), "argument --timeout: -1: must be greater than 0"),
    (("reward", "annotate", *ASK, "--give-up", "nan"), "argument --give-up: nan: must be greater than 0"),
    (("reward", "annotate", *ASK, "--retries", "-1"), "argument --retries: -1: must be at least 0"),
    (("reward", "evaluate", *ASK, "--threshold", "1.5"), "argument --threshold: 1.5: must lie in (0, 1]"),
    (("reward", "evaluate", *ASK, "--samples", "1.5"), "argument --samples: '1.5': expected a whole number"),
    (("reward", "balance", "--input", "i", "--out", "o", "--held-out", "1"), "argument --held-out: 1: must lie in [0, 1)"),
    (("reward", "serve", "m", "--port", "99999"), "argument --port: 99999: must lie in [0, 65535]"),
    (("reward", "serve", "m", "--timeout", "-1"), "argument --timeout: -1: must be greater than 0"),
    (("reward", "serve", "m", "--gpu-memory", "2"), "argument --gpu-memory: 2: must lie in (0, 1]"),
    (("reward", "serve", "m", "--tensor-parallel", "0"), "argument --tensor-parallel: 0: must be at least 1"),
    (("reward", "serve", "m", "--max-model-len", "0"), "argument --max-model-len: 0: must be at least 1"),
    (("reward", "serve", "m", "--max-num-seqs", "-4"), "argument --max-num-seqs: -4: must be at least 1"),
    (("data", "check", "d", "--model", "m", "--min-pixels", "0"), "argument --min-pixels: 0: must be at least 1"),
    (("data", "check", "d", "--max-pixels", "9"), "name the model's folder"),
    (("data", "check", "d", "--model", "m", "--min-pixels", "9", "--max-pixels", "8"), "--min-pixels 9 is more than --max-pixels 8"),
])
def test_numbers_out_of_range_are_refused_before_anything_is_read(capsys, arguments, expected):
    assert expected in said(capsys, *arguments)


def test_usage_is_told_by_the_first_rank_alone(capsys, monkeypatch):
    from sophiavl_fast.cli import main

    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", "--limit", "0"])
        assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == lines


def test_what_the_system_refuses_is_one_line_of_any_rank(capsys, monkeypatch):
    from sophiavl_fast import cli

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "_report", full)
    assert said(capsys, "report", "d") == "sophiavl-fast: OSError: [Errno 28] No space left on device"
    monkeypatch.setenv("RANK", "3")
    assert said(capsys, "report", "d") == "sophiavl-fast: rank 3: OSError: [Errno 28] No space left on device"
    monkeypatch.setattr(cli, "_report", lambda _: {}["a bug"])
    with pytest.raises(KeyError):
        cli.main(["report", "d"])


def test_a_folder_that_takes_no_file_is_refused_before_anything_is_answered(capsys, tmp_path, monkeypatch):
    able = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **more: Path(path) != tmp_path and able(path, mode, **more))
    (tmp_path / "i").write_text("")
    line = f"--out '{tmp_path}/x.json': nothing can be written in folder '{tmp_path}'"
    assert line in said(capsys, "evaluate", "--model", "m", "--data", "d", "--out", f"{tmp_path}/x.json")
    assert line in said(capsys, "reward", "evaluate", "--input", f"{tmp_path}/i", "--out", f"{tmp_path}/x.json", "--url", "http://h", "--model", "m")


def test_the_functions_behind_evaluate_and_infer_refuse_the_same(tmp_path):
    from sophiavl_fast.errors import UserError
    from sophiavl_fast.evaluate.command import evaluate
    from sophiavl_fast.evaluate.infer import infer

    for wrong, words in (({"limit": -1}, "eval.limit = -1: must be at least 1"), ({"max_new_tokens": 0}, "rollout.max_new_tokens = 0: must be at least 1")):
        with pytest.raises(UserError, match=words):
            evaluate("m", "d", "", tmp_path / "x.json", **wrong)
    with pytest.raises(UserError, match="--max-new-tokens 0: must be at least 1"):
        infer("m", [], "what?", max_new_tokens=0)


def test_nothing_to_answer_is_no_result(capsys, tmp_path, model, monkeypatch):
    """An empty file is refused where it is opened; records that are all left out, by `evaluate`."""
    (tmp_path / "set.jsonl").write_text("")
    (tmp_path / "registry.json").write_text(json.dumps({"mine": {"file_path": "set.jsonl"}}))
    arguments = ("evaluate", "--model", str(model), "--data", "mine", "--registry", f"{tmp_path}/registry.json", "--out", f"{tmp_path}/x.json")
    assert "holds no record" in said(capsys, *arguments)
    monkeypatch.setattr("sophiavl_fast.evaluate.command.open_eval", lambda *_, **__: [])
    assert "dataset 'mine' holds no record to answer" in said(capsys, *arguments)
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(("engine", "record", "more", "expected"), [
    ("vllm", {"reasoning_check": "demo_digit"}, (), "reasoning_check"),
    ("transformers", {"reasoning_check": 3}, (), "reasoning_check must be the name of a rule, not int"),
    ("vllm", {"problem_type": "multiple choice", "options": ["w", "x"], "solution": "E"}, (), "names none of the 2 options"),
    ("vllm", {"path": ["a.png"] * 17}, (), "17 images; the rollout engine takes at most 16 a prompt"),
    ("vllm", {}, ("--max-new-tokens", "1000000"), "(max_position_embeddings); lower --max-new-tokens"),
    ("transformers", {}, ("--max-new-tokens", "1000000"), "(max_position_embeddings); lower --max-new-tokens")])
def test_records_that_would_end_an_evaluation_are_refused_before_the_model_loads(capsys, tmp_path, model, engine, record, more, expected):
    row = {"problem_id": 1, "problem": "how many?", "problem_type": "numerical", "solution": "<answer>3</answer>", "path": "", **record}
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    (tmp_path / "set.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "registry.json").write_text(json.dumps({"mine": {"file_path": "set.jsonl"}}))
    arguments = ("evaluate", "--model", str(model), "--data", "mine", "--registry", f"{tmp_path}/registry.json", "--out", f"{tmp_path}/x.json")
    assert expected in said(capsys, *arguments, "--engine", engine, *more) and not (tmp_path / "x.json").exists()
