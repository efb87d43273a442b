"""The doctor: every check is a row, a crash of an engine included, and its exit code says whether anything failed."""
import io
import json
import os
import socket

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from sophiavl_fast.config import Config, build
from sophiavl_fast.monitor import checks, fit
from sophiavl_fast.monitor.doctor import doctor


@pytest.fixture(scope="module")
def here():
    """This machine, examined once: importing every engine takes half a minute."""
    return checks.machine(None)


@pytest.fixture
def setup(tmp_path):
    """A model folder and a registry with one dataset, and the config that names them."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({
        "model_type": "qwen2_5_vl", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 131, "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 64}}))
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(model))
    save_file({name: torch.zeros(p.shape) for name, p in whole.named_parameters()}, str(model / "model.safetensors"))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_path": "rows.jsonl"}}))
    return build({"recipe": "rl", "device": "cpu", "run": {"dir": str(tmp_path / "run")}, "policy": {"tokens_per_row": 1024},
                  "rollout": {"max_new_tokens": 32}, "model": {"path": str(model), "dtype": "float32"},
                  "data": {"registry": str(tmp_path / "dataset_info.json"), "train": "mine", "max_prompt_tokens": 256}})


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
    assert "0 failed" in text and all(word in text for word in ("vllm", "/dev/shm", "memory of a rank", "data mine"))
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
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path / "model"))
    assert fit.count_parameters(tmp_path / "model") == whole.num_parameters() > 100_000


@pytest.mark.parametrize("file,text,found,hint", [
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 7\n", "is cut short or no safetensors file", "git lfs pull"),
    ("model.safetensors", b"", "0 bytes without a header", "download"),
    ("config.json", b"null", "holds null", "download"), ("config.json", b"[]", "holds a list", "download"),
    ("config.json", b'{"model_type": "qwen2_5_vl"}', "lacks text_config and vision_config", "whole Hugging Face folder"),
    ("config.json", b'{"model_type": "llava", "text_config": {}, "vision_config": {}}', "model_type 'llava' is not supported", "supported: qwen2_5_vl"),
    ("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}', "names 'b.safetensors', which is not there", "download"),
])
def test_a_model_that_cannot_be_read_is_its_row(setup, tmp_path, file, text, found, hint):
    (tmp_path / "model" / file).write_bytes(text)
    rows = {row.name: row for row in fit.rows(setup, [])}
    assert list(rows) == ["model", "data mine", "layout"] or rows["memory of a rank"].status == "OK"
    assert rows["model"].status == "FAIL" and found in rows["model"].found and hint in rows["model"].hint and "\n" not in rows["model"].found


def test_quantised_weights_are_the_models_row(setup, tmp_path):
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    row = fit.rows(setup, [])[0]
    assert (row.status, row.hint[:10]) == ("FAIL", "dequantise") and "quant_method 'awq'" in row.found


def test_codes_that_nothing_describes_are_the_models_row(setup, tmp_path):
    save_file({"a.weight": torch.zeros(8, dtype=torch.int8), "position_ids": torch.arange(4)}, str(tmp_path / "model" / "model.safetensors"))
    row = fit.rows(setup, [])[0]
    assert (row.status, row.hint[:10]) == ("FAIL", "dequantise") and "tensor 'a.weight' is I8 in model.safetensors (1 such in it)" in row.found


def test_memory_of_a_rank_is_listed_by_item(setup):
    """On a GPU with the engine beside it; too small a one fails with advice, or warns where memory.check says so."""
    setup.device, setup.model.dtype = "auto", "bfloat16"
    setup.thinking.backend = "off"
    gpu = {"name": "x", "gib": 80.0, "sm": "9.0"}
    found = {row.name: row for row in fit.rows(setup, [gpu])}
    assert found["memory of a rank"].status == found["engine memory"].status == "OK"
    assert all(item in found["memory of a rank"].found for item in ("engine 32.0", "activations", "in 72.0 (0.9 of its GPU)"))
    small = gpu | {"gib": 0.02}
    row = {row.name: row for row in fit.rows(setup, [small])}["memory of a rank"]
    assert row.status == "FAIL" and ("would fit" in row.hint or "no layout" in row.hint)
    setup.memory.check = "warn"
    assert statuses(fit.rows(setup, [small]))["memory of a rank"] == "WARN"


def test_each_pipeline_stage_has_its_row(setup, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    setup.parallel.pipeline, setup.rollout.engine = 2, "server"
    assert [name for name in statuses(fit.rows(setup, [])) if name.startswith("memory")] == ["memory, stage 0", "memory, stage 1"]


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


def test_a_gpu_wants_a_c_compiler_and_headers(monkeypatch, tmp_path):
    """Triton builds its link to the driver at the first launch; without them a run ends there."""
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(checks.sysconfig, "get_path", lambda name: str(tmp_path))
    row = checks._toolchain()
    assert row.status == "FAIL" and "Python.h" in row.found and "no C compiler" not in row.found and "apt-get install gcc python3" in row.hint
    (tmp_path / "Python.h").touch()
    assert checks._toolchain().status == "OK"
    compiler.unlink()
    assert checks._toolchain().found.startswith("no C compiler")
