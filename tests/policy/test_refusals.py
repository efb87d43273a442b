"""Model folders and checkpoints that cannot be used: one line, before any weight is loaded. And those that only look otherwise, which are not refused."""
import functools
import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_weights import same, snapshot

from sophiavl_fast import model_folder
from sophiavl_fast.errors import UserError
from sophiavl_fast.policy import checkpoint
from sophiavl_fast.policy.families import open_family


@pytest.fixture
def twin(folder, tmp_path):
    """Copies of the tiny model: `twin(name, {field: value}, weights=bytes, tensors={...})`, a dotted field inside text_config and the like."""
    def copy(name, changes=None, *, weights=None, tensors=None):
        out = shutil.copytree(folder, tmp_path / name)
        tree = json.loads((out / "config.json").read_text())
        for field, value in (changes or {}).items():
            *inside, last = field.split(".")
            functools.reduce(lambda part, key: part[key], inside, tree)[last] = value
        (out / "config.json").write_text(json.dumps(tree))
        if tensors is not None:
            save_file(tensors, str(out / "model.safetensors"))
        if weights is not None:
            (out / "model.safetensors").write_bytes(weights)
        return out
    return copy


def test_weights_that_cannot_be_read_are_one_line(folder, twin, create):
    whole, tensors = (folder / "model.safetensors").read_bytes(), load_file(folder / "model.safetensors")
    key = "model.layers.1.self_attn.k_proj.weight"
    lost = twin("lost")
    (lost / "model.safetensors").rename(lost / "model-00001-of-00002.safetensors")
    (lost / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: f"model-0000{1 + (n == key)}-of-00002.safetensors" for n in tensors}}))
    index = twin("index")
    (index / "model.safetensors.index.json").write_text("{")
    for path, message in (
            (twin("cut", weights=whole[:len(whole) // 2]), r"'model.safetensors' is cut short or no safetensors file .*download"),
            (twin("long", weights=whole + b"x"), r"is cut short or no safetensors file"),
            (twin("zero", weights=b""), r"0 bytes without a header"),
            (twin("lfs", weights=b"version https://git-lfs.github.com/spec/v1\noid sha"), "git lfs pull"),
            (lost, r"index.json names 'model-00002-of-00002.safetensors', which is not there \(1 of 2 files are missing\)"),
            (index, r"index.json cannot be used \(JSONDecodeError"),
            (twin("codes", tensors=tensors | {key: tensors[key].to(torch.int8)}), rf"tensor '{key}' is I8 in model.safetensors \(1 such"),
    ):
        with pytest.raises(UserError, match=f"^model.path = '{path}': .*{message}"):
            model_folder.refuse_unreadable(path)
        with pytest.raises(UserError, match=f"^model.path = '{path}': [^\n]*$"):  # also where nobody looked before
            create(path)
    with pytest.raises(UserError, match=r"quantised weights \(quantization_config, quant_method 'fp8'\), which cannot be trained; dequantise"):
        create(twin("fp8", {"quantization_config": {"quant_method": "fp8"}}))
    model_folder.refuse_unreadable(twin("described", {"quantization_config": {"quant_method": "fp8"}},  # an engine may know how to read these
                                        tensors=tensors | {key: tensors[key].to(torch.float8_e4m3fn)}))
    model_folder.refuse_unreadable(folder)
    for odd, message in ((tensors[key][:-1], r"k_proj.weight, .* have the shapes \[64, 64\], \[31, 64\].*of different models"),
                         (tensors[key][:, :-1], "of different models"), (tensors[key][:16], r"of different models|expected \[128, 64\]")):
        with pytest.raises(UserError, match=message):
            create(twin(f"odd{len(odd)}-{odd.shape[1]}", tensors=tensors | {key: odd.contiguous()}))


@pytest.mark.parametrize("changes,message", [
    ({"text_config.num_hidden_layers": 3}, r"config.json cannot be used: .*num_hidden_layers"), ({"vision_config": None}, "lacks vision_config"),
    ({"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, r"mrope_section = None; .* that sum to 8, half the head width"),
    ({"text_config.rope_parameters.mrope_section": [2, 3, 4]}, r"mrope_section = \[2, 3, 4\]"), ({"model_type": None}, "model_type 'None' is not supported"),
])
def test_a_config_that_cannot_be_used_is_one_line(twin, changes, message):
    with pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$"):
        open_family(twin("odd", changes))


@pytest.mark.parametrize("text,message", [
    ("null", "holds null instead of an object"), ("[]", "holds a list"), ("{", "cannot be read"), ("{}", "model_type 'None'")])
def test_a_config_that_is_no_object_is_one_line(twin, text, message):
    (path := twin("odd") / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        open_family(path.parent)


def test_a_spoilt_checkpoint_is_one_line_and_names_another(folder, create, tmp_path):
    policy = create(folder)
    path = [checkpoint.save(policy, tmp_path, step, {}, keep=9) for step in (1, 2)][1]
    part, manifest = path / "part-0-0.safetensors", json.loads((path / "manifest.json").read_text())
    before, whole = snapshot(policy), part.read_bytes()

    def refused(message):
        for load in (lambda: checkpoint.refuse_unusable(path, policy.config), lambda: checkpoint.load(policy, path)):
            with pytest.raises(UserError, match=f"{message}.*; another one is '{tmp_path}/checkpoints/step_1'$"):
                load()

    part.write_bytes(whole[:1000])
    refused(r"'part-0-0.safetensors' is cut short \(1000 bytes of \d+\)")
    part.unlink()
    refused("'part-0-0.safetensors' is not there")
    part.write_bytes(whole)
    for spoilt, lacks in (({}, "step, updates, identity, state, tensors"), ([], "step, updates"), (manifest | {"identity": 1}, "identity"),
                          (manifest | {"tensors": {"a": 1}}, "the files of its tensors")):
        (path / "manifest.json").write_text(json.dumps(spoilt))
        refused(f"is not a checkpoint: manifest.json lacks {lacks}")
    assert same(before, snapshot(policy))
    (path / "manifest.json").write_text(json.dumps(manifest))
    checkpoint.refuse_unusable(path, policy.config)
    with pytest.raises(UserError, match=f"'{tmp_path}' is not a checkpoint.*; did you mean '{path}'"):
        checkpoint.read_state(tmp_path)


def test_a_checkpoint_is_of_what_config_json_computes_not_of_how_it_is_written(folder, create, twin, tmp_path):
    policy = create(folder)
    path = checkpoint.save(policy, tmp_path, 1, {"config": {"model": {"path": "there"}}}, keep=1)
    for changes, message in (({"text_config.rope_parameters.rope_theta": 5e4}, r"text_config.rope_parameters.rope_theta is 10000.0 there, 50000.0 here"),
                             ({"text_config.rms_norm_eps": 1e-5}, "text_config.rms_norm_eps is 1e-06"), ({"vision_config.window_size": 112}, "window_size"),
                             ({"vision_config.fullatt_block_indexes": [0]}, r"fullatt_block_indexes is \[1\] there, \[0\] here")):
        with pytest.raises(UserError, match=f"is of another model: .*{message}.*; resume with the run's own model.path = 'there'$"):
            checkpoint.refuse_unusable(path, tiny.config(twin("other", changes)))
        shutil.rmtree(tmp_path / "other")
    with pytest.raises(UserError, match=r"model.freeze_vision is False there, True here; set model.freeze_vision=false$"):
        checkpoint.refuse_unusable(path, tiny.config(folder, model={"path": str(folder), "dtype": "float32", "freeze_vision": True}))
    unfelt = {"dtype": "bfloat16", "transformers_version": "4.0", "text_config.attention_dropout": 0.1, "text_config.use_cache": False,
              "architectures": ["Other"], "text_config.eos_token_id": 5, "text_config.initializer_range": 0.5}
    manifest = json.loads((path / "manifest.json").read_text())
    for name, stored in (("new", manifest["identity"]), ("old", {k: v for k, v in manifest["identity"].items() if k != "fields"})):
        (path / "manifest.json").write_text(json.dumps(manifest | {"identity": stored}))
        checkpoint.refuse_unusable(path, tiny.config(twin(name, unfelt)))
    checkpoint.load(policy, path)
