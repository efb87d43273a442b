"""The doctor: every check is a row, a crash of an engine included, and its exit code says whether anything failed."""
import io
import json
import os
import socket

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from sophiavl_fast.config import Config, build
from sophiavl_fast.monitor import checks, fit
from sophiavl_fast.monitor.doctor import doctor


@pytest.fixture(scope="module")
def here():
    """This machine, examined once: importing every engine takes half a minute."""
    return checks.machine(None)


@pytest.fixture
def setup(tmp_path):
    """A model folder of 1,536 parameters and a registry with one dataset, and the config that names them."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    save_file({"a": torch.zeros(16, 64), "b": torch.zeros(512)}, str(model / "model.safetensors"))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_path": "rows.jsonl"}}))
    return build({"recipe": "rl", "device": "cpu", "run": {"dir": str(tmp_path / "run")}, "model": {"path": str(model), "dtype": "float32"},
                  "data": {"registry": str(tmp_path / "dataset_info.json"), "train": "mine"}})


def statuses(rows):
    return {row.name: row.status for row in rows}


def test_this_machine_has_every_row_and_runs_the_engines(here):
    found = statuses(here.rows)
    names = ["python", "torch", "GPU", "torchvision", "vllm", "megatron-core", "triton", "transformers", "C++ build", "cores", "memory", "/dev/shm",
             "disk", "loopback", "tensorboard", "wandb", "trackio"]
    assert list(found) == names
    assert all(found[name] == "OK" for name in ("python", "torch", "torchvision", "vllm", "megatron-core", "transformers", "loopback"))
    assert {row.name: row.found for row in here.rows}["torch"] == torch.__version__


@pytest.mark.parametrize("code,error", [
    ("import os; os.kill(os.getpid(), 11)", "killed by signal 11"), ("import no_such_engine", "ModuleNotFoundError: No module named 'no_such_engine'"),
    ("import time; time.sleep(60)", "no answer in 1 s"), ("raise SystemExit(3)", "exit code 3"),
])
def test_an_engine_that_crashes_or_hangs_is_a_row(code, error):
    found = checks.probe(code, deadline_s=1.0)
    assert found == {"error": error}
    row = checks._package("vllm", found, {}, "install it")
    assert (row.status, row.found, row.hint) == ("FAIL", error, "install it")


def test_another_version_than_the_tested_one_is_a_warning():
    pins = checks._pins("cpu")
    assert checks._package("vllm", {"version": "0.1.0"}, pins, "").status == "WARN"
    assert checks._package("torch", {"version": "2.13.0+cpu"}, pins, "").status == "OK"


def test_the_table_and_the_exit_code(here, setup, monkeypatch):
    monkeypatch.setattr(checks, "machine", lambda config: here)  # the rows of the real examination above
    out = io.StringIO()
    assert doctor(setup, Console(file=out, width=200)) == 0
    text = out.getvalue()
    assert "0 failed" in text and all(word in text for word in ("vllm", "/dev/shm", "policy memory", "data mine"))
    setup.data.train = "min"
    out = io.StringIO()
    assert doctor(setup, Console(file=out, width=200)) == 1
    assert "not in the registry; did you mean 'mine'?" in out.getvalue() and "1 failed" in out.getvalue()


def test_a_config_that_fits(setup):
    assert set(statuses(fit.rows(setup, [])).values()) == {"OK"}


@pytest.mark.parametrize("key,value,row", [
    ("model", "path", "model"), ("data", "registry", "data"), ("data", "train", "data nowhere"), ("parallel", "tensor", "layout"),
])
def test_a_config_that_does_not_fit_names_the_row(setup, key, value, row):
    setattr(getattr(setup, key), value, 3 if value == "tensor" else "nowhere")
    assert statuses(fit.rows(setup, []))[row] == "FAIL"


def test_a_dataset_whose_file_is_gone(setup, tmp_path):
    (tmp_path / "rows.jsonl").unlink()
    assert statuses(fit.rows(setup, []))["data mine"] == "FAIL"


def test_parameters_are_counted_from_the_headers(setup, tmp_path):
    assert fit.count_parameters(tmp_path / "model") == 1536


def test_memory_of_a_rank():
    """7 B parameters in bf16, tensor 2 x data 4: 2 + 4 + 12/4 bytes a parameter and the reference's 2, over two tensor ranks."""
    config = build({"model": {"dtype": "bfloat16"}, "parallel": {"tensor": 2}, "algorithm": {"kl_coef": 0.04}})
    parts = fit.rank_bytes(config, 7 * 10**9, world=8)
    assert parts == {"weights": 7e9, "gradients": 14e9, "optimizer": 10.5e9, "reference": 7e9}
    config.algorithm.kl_coef = 0.0
    assert fit.rank_bytes(config, 7 * 10**9, world=8)["reference"] == 0
    gpu = {"name": "x", "gib": 24.0, "sm": "9.0"}
    assert fit._memory(config, 7 * 10**9, 8, [gpu]).status == "FAIL"
    assert fit._memory(config, 7 * 10**9, 8, [gpu | {"gib": 139.0}]).status == "OK"


def test_a_taken_port_fails_and_a_free_one_does_not():
    config = Config()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        config.rollout.port = listener.getsockname()[1]
        row = checks._ports(config)
        assert row.status == "FAIL" and str(config.rollout.port) in row.found and "rollout.port=0" in row.hint
    config.rollout.port = 0
    assert checks._ports(config).status == "OK"


def test_a_wanted_logger_or_gpu_that_is_missing_fails():
    config = Config(device="cuda")
    config.monitor.wandb = True
    assert checks._gpus([], config).status == "FAIL" and checks._gpus([], None).status in ("OK", "WARN")
    try:
        import wandb  # noqa: F401
        expected = "OK"
    except ImportError:
        expected = "FAIL"
    assert statuses(checks._loggers(config))["wandb"] == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    assert checks._disk(tmp_path / "run").status == "FAIL"
