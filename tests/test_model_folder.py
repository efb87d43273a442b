"""What stands in a model folder, and what loads from it: one line where it cannot be used, never weights drawn at random."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sophiavl_fast import model_folder
from sophiavl_fast.config import Config
from sophiavl_fast.errors import UserError
from sophiavl_fast.evaluate import transformers_engine
from sophiavl_fast.monitor import fit
from sophiavl_fast.recipes import setup


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from sophiavl_fast.data.demo import tiny_model

    out = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model.build(out, 0)
    return out


@pytest.fixture
def changed(folder, tmp_path):
    """A copy of the tiny model with some of its config.json or its tensors changed."""
    def copy(config=None, tensors=None):
        out = shutil.copytree(folder, tmp_path / f"copy{len(list(tmp_path.iterdir()))}")
        if config is not None:
            tree = json.loads((out / "config.json").read_text())
            config(tree)
            (out / "config.json").write_text(json.dumps(tree))
        if tensors is not None:
            kept = load_file(out / "model.safetensors")
            save_file(tensors(kept), str(out / "model.safetensors"))
        return out
    return copy


def test_weights_are_never_drawn_at_random(folder, changed):
    assert model_folder.open_model(folder, dtype="auto").num_parameters() > 0
    layer = "layers.1."
    lost = changed(tensors=lambda kept: {name: value for name, value in kept.items() if layer not in name})
    for refuse in (lambda: model_folder.open_model(lost, dtype="auto"), lambda: transformers_engine.load(str(lost), torch.float32, torch.device("cpu"))):
        with pytest.raises(UserError, match=rf"^model.path = '{lost}': tensor '.*layers.1.input_layernorm.weight' of the model of config.json is in no weight "
                           r"file \(12 such\); download"):
            refuse()
    odd = changed(tensors=lambda kept: {name: value[:1] if name.endswith("layers.1.mlp.up_proj.weight") else value for name, value in kept.items()})
    with pytest.raises(UserError, match=rf"^thinking.path = '{odd}': 1 weights are missing or of another shape than .*, such as '.*layers.1"):
        model_folder.open_model(odd, "thinking.path", dtype="auto")


EXTRA = [({"model.layers.9.mlp.up_proj.weight": 0, "model.layers.9.input_layernorm.weight": 0, "model.norm.weights": 0},
          r"'model.layers.9.input_layernorm.weight' has no place in the model of config.json \(3 such\); weights and config.json are of different models"),
         ({"model.layers.0.self_attn.q_proj.lora_A.weight": 0}, r"q_proj.lora_A.weight' has no place .* \(1 such\); merge the adapter into its model first"),
         ({"v_head.summary.weight": 0}, r"'v_head.summary.weight' has no place .* \(1 such\); drop another tool's value head"),
         ({"model.layers.0.self_attn.k_proj.k_scale": 0}, r"k_scale' has no place .* \(1 such\); drop what a quantisation left, or dequantise .* first")]


@pytest.mark.parametrize("extra,message", EXTRA)
def test_tensors_without_a_place_are_refused_before_any_weight_is_read(changed, monkeypatch, extra, message):
    """They would be trained past and dropped at the export; by every command, the doctor included."""
    path = changed(tensors=lambda kept: kept | {name: torch.ones(2) for name in extra})
    row = fit._model(Config.model_validate({"model": {"path": str(path)}}))
    assert row.status == "FAIL" and "has no place in the model of config.json" in row.found
    monkeypatch.setattr("transformers.modeling_utils.safe_open", lambda *_, **__: pytest.fail("a weight was read"))
    for refuse in (model_folder.refuse_unreadable, model_folder.open_model):
        with pytest.raises(UserError, match=f"^thinking.path = '{path}': [^\n]*{message}$"):
            refuse(path, "thinking.path")
    with pytest.raises(UserError, match=f"^model.path = '{path}': [^\n]*{message}$"):
        setup.refuse_unreadable(Config.model_validate({"model": {"path": str(path)}, "recipe": "sft"}))


def test_codes_that_config_json_describes_bring_scales_along(changed):
    path = changed(lambda tree: tree.update(quantization_config={"quant_method": "fp8"}), lambda kept: kept | {"model.norm.weight_scale": torch.ones(1)})
    model_folder.refuse_unreadable(path)


@pytest.mark.parametrize("change", [lambda tree: tree.update(vision_config=3), lambda tree: tree["text_config"].update(hidden_act="none"),
                                    lambda tree: tree.update(model_type="nothing")])
def test_whatever_transformers_raises_is_one_line(changed, change):
    with pytest.raises(UserError, match=r"^thinking.path = '[^\n]*': transformers cannot load it: [^\n]*$"):
        model_folder.open_model(changed(change), "thinking.path")


@pytest.mark.parametrize("text,top,expected", [(None, None, 1 << 30), (None, 9, 9), (7, 9, 7), ("absent", "absent", 1 << 30), ("absent", 5, 5)])
def test_the_longest_sequence(changed, text, top, expected):
    def change(tree):
        for part, value in ((tree["text_config"], text), (tree, top)):
            part.pop("max_position_embeddings", None)
            if value != "absent":
                part["max_position_embeddings"] = value
    assert model_folder.longest(changed(change)) == expected


@pytest.mark.parametrize("value", ["many", 3.5, [4096], True, 0])
def test_a_longest_sequence_that_is_no_number(changed, value):
    path = changed(lambda tree: tree["text_config"].update(max_position_embeddings=value))
    with pytest.raises(UserError, match=rf"^model.path = '{path}': config.json: max_position_embeddings = .*expected a whole number"):
        model_folder.longest(path)


@pytest.mark.parametrize("entry", [{"shape": [1], "data_offsets": [0, 4]}, {"dtype": "F32", "data_offsets": [0, 4]}, [], 3])
def test_a_header_without_its_fields(changed, entry):
    path = changed()
    head = json.dumps({"a.weight": entry}).encode()
    (path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(4))
    with pytest.raises(UserError, match=rf"^thinking.path = '{path}': 'model.safetensors' is cut short or no safetensors file"):
        model_folder.refuse_unreadable(path, "thinking.path")


def test_neighbours_that_may_not_be_looked_into_are_left_out(folder, tmp_path, locked):
    for name in ("locked", "models/locked"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copytree(folder, tmp_path / "models" / "tiny")
    with pytest.raises(UserError, match=r"models/tyny' is no model folder \(no config.json\); did you mean '.*models/tiny'"):
        model_folder.refuse_missing(tmp_path / "models" / "tyny")
    with pytest.raises(UserError, match=r"locked/model' is no model folder"):
        model_folder.refuse_missing(tmp_path / "locked" / "model")
