"""Each family in one process against plain transformers; refusals of what no adapter covers. Layouts: test_layouts.py."""
import json
import shutil

import matrix
import pytest
import tiny
import torch
import zoo
from matrix import Job
from safetensors.torch import load_file, save_file
from test_parity import draw, gradients, weighted_sum
from transformers import AutoModelForImageTextToText

from sophiavl_fast import model_folder
from sophiavl_fast.errors import EngineError, UserError
from sophiavl_fast.policy import checkpoint
from sophiavl_fast.policy.families import Qwen3_VL, open_family
from sophiavl_fast.policy.model import check_layout


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("job", [
    *(Job(kind, "TP1", tied, share) for kind in ("qwen3_vl", "internvl3") for tied, share in ((False, True), (True, False))),
    *(Job(kind, "TP1") for kind in ("internvl2_5", "internvl3_5"))], ids=lambda j: j.name)
def test_matches_hf(root, job):
    """Log-probs, gradients of every parameter, and the export of untouched weights: rows of one group, and all groups in one row."""
    matrix.run([job], root)
    found = matrix.measure(job, root)
    assert found.logprob < 1e-5 and found.gradient < 1e-5 and found.export


def test_deepstack_is_felt(root, create):
    """Without what it adds the log-probs of prompts with images are others; text alone stays."""
    path, groups = matrix.folder(root, "qwen3_vl", False), zoo.groups("qwen3_vl")
    policy = create(path)
    (whole,) = policy.logprobs(policy.pack(groups, None))
    honest = policy.family.image_features
    policy.family.image_features = lambda *images: (honest(*images)[0], [])
    (without,) = policy.logprobs(policy.pack(groups, None))
    sizes = [sum(len(r.token_ids) for r in g.responses) for g in groups]
    one, many, text, again = ((a - b).abs().max() for a, b in zip(whole.split(sizes), without.split(sizes)))
    assert min(one, many, again) > 1e-2 and text < 1e-6


@pytest.mark.parametrize("kind", ["qwen3_vl", "internvl3"])
@pytest.mark.parametrize("setting", [{"policy": {"recompute": True}}, {"model": {"freeze_vision": True}},
                                     {"model": {"freeze_vision": True}, "policy": {"recompute": True}}], ids=["recompute", "frozen", "both"])
def test_recompute_and_frozen_vision(root, create, kind, setting):
    """The same gradients as without, of what is trained."""
    path, groups = matrix.folder(root, kind, False), zoo.groups(kind)
    weights = draw(groups)
    policy = create(path, optim={"clip_grad": 0.0}, policy={"tokens_per_row": 60})
    expected = gradients(policy, policy.pack(groups, None), weights)
    floor = 1e-6 * torch.stack([g.norm() for g in expected.values()]).norm()
    sections = {"optim": {"clip_grad": 0.0}} | setting
    sections["policy"] = {"tokens_per_row": 60} | sections.get("policy", {})
    policy = create(path, **sections)
    found = gradients(policy, policy.pack(groups, None), weights)
    trained = {n for n, p in expected.items() if "model" not in setting or not n.startswith(("model.visual.", "vision_tower.", "multi_modal"))}
    assert set(found) == trained
    assert max(((found[n] - expected[n]).norm() / expected[n].norm().clamp_min(floor)).item() for n in found) < 1e-5


@pytest.mark.parametrize("kind", ["qwen3_vl", "internvl3"])
def test_compare_hf_sees_the_live_weights(root, create, kind):
    groups = zoo.groups(kind)
    policy = create(matrix.folder(root, kind, True), policy={"tokens_per_row": 100}, banned_ids=[1, 115], temperature=0.8)
    batches = policy.pack(groups, None)
    before = policy.logprobs(batches)
    assert policy.compare_hf(batches, before) < 1e-5
    policy.update(batches, weighted_sum(batches, draw(groups)))
    assert policy.compare_hf(batches, policy.logprobs(batches)) < 1e-5
    assert policy.compare_hf(batches, before) > 1e-4


def test_compare_hf_has_no_dropout_either(root, create, tmp_path):
    path = shutil.copytree(matrix.folder(root, "qwen2_5_vl", False), tmp_path / "drop")
    tree = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(tree | {"text_config": tree["text_config"] | {"attention_dropout": 0.3}}))
    policy = create(path, policy={"tokens_per_row": 100})
    batches = policy.pack(zoo.groups("qwen2_5_vl"), None)
    assert policy.compare_hf(batches, policy.logprobs(batches)) < 1e-5


def test_internvl_folder_under_in_memory_names_loads(root, create, tmp_path):
    """Folders that newer tools save spell names as transformers holds them."""
    path = matrix.folder(root, "internvl3", False)
    twin = tmp_path / "twin"
    twin.mkdir()
    family = open_family(path)
    save_file({family.in_memory(n): t for n, t in load_file(path / "model.safetensors").items()}, str(twin / "model.safetensors"))
    (twin / "config.json").write_text((path / "config.json").read_text())
    weights = {n: t.clone() for n, t in create(path).weights()}
    assert all(torch.equal(t, weights[n]) for n, t in create(twin).weights())


def test_a_tied_config_beside_a_head_of_its_own_is_not_tied(root, create, tmp_path):
    path = matrix.folder(root, "internvl3", False)
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    tree = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(tree | {"tie_word_embeddings": True}))
    model_folder.refuse_unreadable(tmp_path)
    assert "language_model.lm_head.weight" in dict(create(tmp_path).weights())


@pytest.mark.parametrize("kind", zoo.FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_leaves_out_is_no_tensor_too_many(root, tmp_path, kind, tied):
    """Buffers that older versions stored, a copy of the embedding as the tied head, either spelling of names; anything else is one too many."""
    path = matrix.folder(root, kind, tied)
    family, kept = open_family(path), load_file(path / "model.safetensors")
    shutil.copy(path / "config.json", tmp_path)
    buffers = {f"{family.language}layers.0.self_attn.rotary_emb.inv_freq": 0, f"{family.language}rotary_emb.inv_freq": 0}
    buffers |= {} if kind == "internvl3" else {f"{family.vision_tower}rotary_pos_emb.inv_freq": 0}
    whole = kept | {name: torch.ones(2) for name in buffers} | {family.head_name: kept.get(family.head_name, kept[family.embedding_name]).clone()}
    for spelled in (family.published, family.in_memory):
        save_file({spelled(name): value for name, value in whole.items()}, str(tmp_path / "model.safetensors"))
        model_folder.refuse_unreadable(tmp_path)
        extra = spelled(f"{family.language}layers.4.input_layernorm.weight")
        save_file({spelled(name): value for name, value in whole.items()} | {extra: torch.ones(2)}, str(tmp_path / "model.safetensors"))
        with pytest.raises(UserError, match=rf"tensor '{extra}' has no place in the model of config.json \(1 such\)"):
            model_folder.refuse_unreadable(tmp_path)
        ends = [{family.embedding_name, family.head_name}] if tied else [{family.embedding_name}, {family.head_name}]
        for lost in ({f"{family.language}layers.1.self_attn.k_proj.weight"}, {min(n for n in kept if "vis" in n)}, *ends):
            some, name = {n: value for n, value in whole.items() if n not in lost}, min(lost, key=lambda n: n == family.head_name)
            save_file({spelled(n): value for n, value in some.items()}, str(tmp_path / "model.safetensors"))
            with pytest.raises(UserError, match=rf"tensor '{family.in_memory(name)}' of the model of config.json is in no weight file \(1 such\)"):
                model_folder.refuse_unreadable(tmp_path)


@pytest.mark.parametrize("kind,sections,message", [
    ("qwen3_vl", {"pipeline": 4}, r"the first pipeline stage holds 1 layers, but qwen3_vl adds image features to its first 2 \(DeepStack\): lower parallel"),
    ("qwen3_vl", {"pipeline": 2, "stages": [1, 3]}, r"first pipeline stage holds 1 layers.*begin parallel.stages with at least 2"),
    ("internvl3", {"pipeline": 3}, r"parallel.pipeline = 3 does not divide the model's 4 layers; set the shares by parallel.stages=\[1, 1, 2\]"),
    ("internvl3", {"pipeline": 2, "stages": [1, 2]}, r"parallel.stages = \[1, 2\]: parallel.pipeline = 2 wants 2 shares of at least one layer, 4 in all"),
    ("internvl3", {"tensor": 4}, r"parallel.tensor = 4 does not divide the model's num_query_groups = 2"),
])
def test_layouts_that_cannot_be(root, kind, sections, message):
    family, config = open_family(matrix.folder(root, kind, False)), tiny.config(root, parallel=sections)
    with pytest.raises(UserError, match=message):
        check_layout(family, config)


@pytest.mark.parametrize("change,message", [
    ({"model_type": "llava"}, r"model_type 'llava' is not supported; supported: qwen2_5_vl, qwen3_vl, internvl$"),
    ({"model_type": "internvl_chat"}, r"'internvl_chat' is not supported \('internvl_chat' is the older format: take the folder's -hf twin\)"),
    ({"vision_feature_layer": -2}, r"vision_feature_layer -2 with strategy 'default' is not supported"),
    ({"text_config": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}}, r"rope_type 'yarn' is not supported"),
    ({"text_config": {"model_type": "gpt2"}}, r"a internvl with a 'gpt2' language model is not supported; supported: qwen2, "),
    ({"text_config": {"model_type": "llama", "attention_bias": True}}, "attention_bias, mlp_bias and hidden_act"),
])
def test_folders_that_no_adapter_covers(root, tmp_path, change, message):
    tree = json.loads((matrix.folder(root, "internvl3", False) / "config.json").read_text())
    merged = tree | change | ({"text_config": tree["text_config"] | change["text_config"]} if "text_config" in change else {})
    (tmp_path / "config.json").write_text(json.dumps(merged))
    with pytest.raises(UserError, match=message):
        open_family(tmp_path)


def test_a_checkpoint_of_another_family_is_refused(root, create, tmp_path):
    checkpoint.save(create(matrix.folder(root, "internvl3", False)), tmp_path, 1, {}, keep=1)
    policy = create(matrix.folder(root, "qwen3_vl", False))
    with pytest.raises(UserError, match="is of another model: model_type is 'internvl' there, 'qwen3_vl' here"):
        checkpoint.load(policy, checkpoint.newest(tmp_path))


@pytest.mark.parametrize("kind", zoo.FAMILIES)
def test_a_folder_that_was_written_again_is_the_same_model(root, create, tmp_path, kind):
    """The policy's own export, a model saved anew by transformers, and a config of Qwen2.5-VL with the text's fields at the top, as it was published."""
    path = matrix.folder(root, kind, False)
    family = create(path).family
    own = open_family(create(path).export(tmp_path / "own"))
    AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(tmp_path / "again")
    again = open_family(tmp_path / "again")
    assert family.described == own.described == again.described and len(family.described) > 20
    tree = json.loads((path / "config.json").read_text())
    if kind == "qwen2_5_vl":
        text = tree.pop("text_config")
        rope = text.pop("rope_parameters")
        (tmp_path / "own" / "config.json").write_text(json.dumps({
            **text, **tree, "rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}))
        flat = open_family(tmp_path / "own").described
        assert {k: flat[k] for k in family.described if k in flat} == {k: v for k, v in family.described.items() if k in flat}
        assert flat["text_config.rope_parameters.rope_theta"] == 1e4


@pytest.mark.parametrize("kind", zoo.FAMILIES)
def test_image_tokens_that_do_not_fit_are_refused(root, kind):
    family, prompt = open_family(matrix.folder(root, kind, False)), zoo.groups(kind)[1].prompt
    ids, grid = torch.tensor(prompt.expanded_ids), prompt.image_grid_thw
    positions, after = family.positions(ids, grid, "prompt x")
    assert positions.shape == (family.position_axes, len(ids)) and after == positions.max() + 1
    with pytest.raises(EngineError, match=r"prompt x: the prompt holds \d+ image tokens, but its images give \d+ features"):
        family.positions(ids, grid[:-1], "prompt x")
    moved, first = ids.clone(), int((ids == tiny.IMAGE).nonzero()[0])
    moved[0], moved[first] = ids[first], ids[0]
    with pytest.raises(EngineError, match=r"image 0 has \d+ features, but its tokens in the prompt are interrupted"):
        family.positions(moved, grid, "prompt x")
    if family.video_token_id is not None:
        ids[0] = family.video_token_id
        with pytest.raises(EngineError, match="prompt x: the prompt holds a video; only images are supported"):
            family.positions(ids, grid, "prompt x")


def test_interleaved_axes():
    """Qwen3-VL's published section [24, 20, 20] of 64 frequencies: t h w in turns, the last ones t."""
    class Text:
        rope_parameters, head_dim = {"rope_theta": 5e6, "mrope_section": [24, 20, 20]}, 128

    family = object.__new__(Qwen3_VL)
    family.text = Text
    base, axes = family.rope()
    assert base == 5e6 and axes[:6] == [0, 1, 2, 0, 1, 2] and axes[60:] == [0] * 4 and [axes.count(i) for i in range(3)] == [24, 20, 20]
