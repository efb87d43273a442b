"""Export, checkpoints, optimizer and schedule, against safetensors, transformers and torch."""
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from sophiavl_fast.config import Optim
from sophiavl_fast.errors import EngineError, UserError
from sophiavl_fast.policy import checkpoint
from sophiavl_fast.policy.optimizer import learning_rate
from sophiavl_fast.policy.saver import Saver


def nll(batch, logprob, entropy):
    """Mean negative log-prob, weighted so that responses differ."""
    weight = 1 + batch.row_of.float().repeat_interleave(batch.cu_seqlens.diff()) / 10
    value = -(weight * logprob).sum() / 60
    return value, value.detach()[None]


def snapshot(policy):
    return {name: tensor.clone() for name, tensor in policy.weights()}


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_untouched_export_is_bitwise_the_source(folder, tied_folder, create, tmp_path, tied):
    path = tied_folder if tied else folder
    create(path).export(tmp_path / "out")
    assert same(load_file(path / "model.safetensors"), load_file(tmp_path / "out/model.safetensors"))
    assert {p.name for p in path.iterdir()} == {p.name for p in (tmp_path / "out").iterdir()}


def test_trained_export_gives_the_policys_logprobs(folder, create, tmp_path):
    policy, groups = create(folder), tiny.groups()
    batches = policy.pack(groups, None)
    policy.update(batches, nll)
    (logprob,) = policy.logprobs(batches)
    policy.export(tmp_path / "out")
    policy.export(tmp_path / "out")  # an older export is replaced
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    expected = torch.cat([x for g in groups for x in tiny.hf_logprobs(model, g)])
    assert (logprob - expected).abs().max() < 1e-5
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"


def test_large_exports_are_sharded(folder, create, tmp_path, monkeypatch):
    monkeypatch.setattr("sophiavl_fast.policy.export.SHARD_BYTES", 100_000)
    policy = create(folder)
    policy.export(tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    found = {n: t for file in set(index["weight_map"].values()) for n, t in load_file(tmp_path / "out" / file).items()}
    assert same(found, snapshot(policy))
    assert same(snapshot(create(tmp_path / "out")), found)


def test_adamw_is_torchs(folder, create):
    """Three updates with clipping and decay (none on biases and norms) against torch.optim.AdamW on the same gradients."""
    policy = create(folder, optim={"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 0.5})
    batches = policy.pack(tiny.groups(), None)
    twin = {n: torch.nn.Parameter(t.clone()) for n, t in policy.weights()}
    optimizer = torch.optim.AdamW([
        {"params": [p for n, p in twin.items() if p.dim() > 1 and not n.endswith("bias")], "weight_decay": 0.1},
        {"params": [p for n, p in twin.items() if p.dim() == 1 or n.endswith("bias")], "weight_decay": 0.0},
    ], lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(3):
        result = policy.update(batches, nll)
        clipped = {n: g.clone() for n, g in policy.gradients()}
        assert result.grad_norm > 0.5
        assert sum(g.square().sum() for g in clipped.values()).sqrt().item() == pytest.approx(0.5, rel=1e-5)
        for n, p in twin.items():
            p.grad = clipped[n]
        optimizer.step()
        for n, tensor in policy.weights():
            assert (tensor - twin[n]).abs().max() < 1e-7, n


def test_gradient_norm_is_the_global_one_before_clipping(folder, create):
    groups, model = tiny.groups(), tiny.hf(folder)
    policy = create(folder, optim={"clip_grad": 0.5})
    (batch,) = policy.pack(groups, None)
    value, _ = nll(batch, torch.cat([x for g in groups for x in tiny.hf_logprobs(model, g)]), None)
    value.backward()
    result = policy.update([batch], nll)
    assert result.grad_norm == pytest.approx(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item(), rel=1e-5)
    assert result.stats.item() == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("schedule,expected", [
    ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ("linear", [0.25, 0.5, 0.75, 1.0, 0.82, 0.64, 0.46, 0.28]),
    ("cosine", [0.25, 0.5, 0.75, 1.0, 0.914, 0.689, 0.411, 0.186]),
])
def test_learning_rate(schedule, expected):
    optim = Optim(lr=1.0, min_lr=0.1, warmup_steps=3, schedule=schedule)
    assert [learning_rate(optim, i, 8) for i in range(8)] == pytest.approx(expected, abs=1e-3)


def test_update_reports_and_uses_the_scheduled_rate(folder, create):
    policy = create(folder, optim={"lr": 1e-3, "schedule": "linear"}, total_steps=2)
    batches = policy.pack(tiny.groups(), None)
    assert [policy.update(batches, nll).lr for _ in range(2)] == pytest.approx([1e-3, 5e-4])
    before = snapshot(policy)
    assert policy.update(batches, nll).lr == 0  # past the end
    assert same(before, snapshot(policy))


def test_a_policy_that_is_not_trained_holds_weights_alone(folder, create):
    """An export's: the same weights and log-probs, no gradient, no optimizer."""
    policy = create(folder)
    batches = policy.pack(tiny.groups(), None)
    expected, weights = policy.logprobs(batches), snapshot(policy)
    bare = create(folder, trained=False)
    assert all(torch.equal(a, b) for a, b in zip(bare.logprobs(batches), expected, strict=True)) and same(weights, snapshot(bare))
    assert not any(hasattr(p, "main_grad") or p.grad is not None for p in bare.model.parameters())
    for ask in (lambda: bare.update(batches, lambda *_: None), lambda: next(bare.gradients())):
        with pytest.raises(EngineError, match=r"Policy.create was told trained=False$"):
            ask()


def test_reference_stays_where_it_was(folder, create):
    policy = create(folder, reference=True)
    batches = policy.pack(tiny.groups(), None)
    (before,) = policy.logprobs(batches)
    policy.update(batches, nll)
    weights = snapshot(policy)
    assert torch.equal(policy.logprobs(batches, reference=True)[0], before)
    assert not torch.equal(policy.logprobs(batches)[0], before)
    assert same(weights, snapshot(policy))


def test_non_finite_gradient_stops_loudly_and_touches_nothing(folder, create):
    policy = create(folder)
    batches = policy.pack(tiny.groups(), None)
    before = snapshot(policy)

    name = "language.decoder.layers.1.mlp.linear_fc2.weight"
    policy.model.get_parameter(name).register_hook(lambda g: g * float("nan"))
    with pytest.raises(EngineError, match=f"update 0: gradient norm is nan; first parameters at fault: {name}$"):
        policy.update(batches, nll)
    assert same(before, snapshot(policy))


FORMATS = pytest.mark.parametrize("form", ["safetensors", "torch_dist"])


@FORMATS
@pytest.mark.parametrize("background", [False, True], ids=["in turn", "in the background"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_run_equals_the_uninterrupted_one(folder, create, tmp_path, dtype, background, form):
    optim = {"lr": 1e-2, "schedule": "cosine"}
    policy = create(folder, model={"dtype": dtype}, optim=optim, reference=True, checkpoint={"format": form})
    batches = policy.pack(tiny.groups(), None)
    for _ in range(2):
        policy.update(batches, nll)
    with Saver(policy, tmp_path, keep=2, background=background) as saver:
        saver.save(2, {"cursor": 17})
        results = [policy.update(batches, nll) for _ in range(2)]
    weights, (reference,) = snapshot(policy), policy.logprobs(batches, reference=True)

    policy = create(folder, model={"dtype": dtype}, optim=optim, reference=True)
    assert checkpoint.load(policy, checkpoint.newest(tmp_path)) == {"cursor": 17}
    for expected in results:
        found = policy.update(batches, nll)
        assert (found.grad_norm, found.lr, found.stats.item()) == (expected.grad_norm, expected.lr, expected.stats.item())
    assert same(weights, snapshot(policy))
    assert torch.equal(policy.logprobs(batches, reference=True)[0], reference)


@FORMATS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_background_save_holds_is_a_copy(folder, create, tmp_path, dtype, form):
    """However slow the disk, later updates do not reach it: weights, main weights and moments."""
    policy = create(folder, model={"dtype": dtype}, optim={"lr": 1e-2}, checkpoint={"format": form})
    batches = policy.pack(tiny.groups(), None)
    policy.update(batches, nll)
    before = snapshot(policy), moments(policy)
    draft = checkpoint.begin(policy, tmp_path, 1, {}, copied=True)
    policy.update(batches, nll)
    assert not same(before[0], snapshot(policy)) and not same(before[1], moments(policy))
    draft.publish(policy.layout.control, keep=1)
    checkpoint.load(policy, draft.target)
    assert same(before[0], snapshot(policy)) and same(before[1], moments(policy))


def moments(policy):
    """All that the optimizer keeps, copied."""
    parts = [(i, part.optimizer) for i, part in enumerate(policy.optimizer.chained_optimizers)]
    found = {f"{i}.{j}.{key}": t for i, adam in parts for j, state in enumerate(adam.state.values()) for key, t in state.items()}
    found |= {f"{i}.{j}.{k}": p for i, adam in parts for j, group in enumerate(adam.param_groups) for k, p in enumerate(group["params"])}
    return {name: t.detach().clone() for name, t in found.items()}


@FORMATS
def test_a_background_save_that_fails_is_told_at_the_next_wait(folder, create, tmp_path, form):
    """The disk takes no file of more than 1,000 bytes: a limit of this process, as a full disk would be."""
    policy, limits = create(folder, checkpoint={"format": form}), resource.getrlimit(resource.RLIMIT_FSIZE)
    told = pytest.raises(UserError, match=r"checkpoint '.*step_2' could not be written \(File too large\); what was saved before it stands$")
    with told, Saver(policy, tmp_path, keep=2, background=True) as saver:
        saver.save(1, {})
        saver.wait()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            saver.save(2, {})
            saver.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


@FORMATS
def test_retention_and_half_written_checkpoints(folder, create, tmp_path, form):
    policy = create(folder, checkpoint={"format": form})
    assert checkpoint.newest(tmp_path) is None
    for step in (8, 9, 10):
        checkpoint.save(policy, tmp_path, step, {"step": step}, keep=2)
    (tmp_path / "checkpoints/.step_11.writing").mkdir()
    (tmp_path / "checkpoints/step_12").mkdir()  # no manifest
    assert checkpoint.newest(tmp_path).name == "step_10"
    assert not (tmp_path / "checkpoints/step_8").exists()
    checkpoint.save(policy, tmp_path, 10, {"step": "anew"}, keep=2)
    assert checkpoint.read_state(checkpoint.newest(tmp_path)) == {"step": "anew"}
    assert not (tmp_path / "checkpoints/.step_11.writing").exists()   # of a save that was killed: it would stay for ever


def test_what_was_just_written_is_never_dropped(folder, create, tmp_path):
    """A run that goes on from an earlier step in a folder with later ones: retention by step alone would leave it none of its own."""
    policy = create(folder)
    for step in (8, 9, 3):
        checkpoint.save(policy, tmp_path, step, {"step": step}, keep=1)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_3", "step_9"]


@FORMATS
def test_checkpoint_of_another_model_is_refused(folder, tied_folder, create, tmp_path, form):
    checkpoint.save(create(folder, checkpoint={"format": form}), tmp_path, 1, {}, keep=1)
    policy = create(tied_folder)
    before = snapshot(policy)
    with pytest.raises(UserError, match=r"is of another model: tie_word_embeddings is False there, True here"):
        checkpoint.load(policy, checkpoint.newest(tmp_path))
    assert same(before, snapshot(policy))
    with pytest.raises(UserError, match="is not a checkpoint"):
        checkpoint.load(policy, tmp_path)


def test_bad_model_folders_give_one_line(folder, create, tmp_path):
    with pytest.raises(UserError, match=r"is no model folder"):
        create(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 8}))
    with pytest.raises(UserError, match=r"model_type 'qwen2' is not supported.*qwen2_5_vl"):
        create(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"no model\.safetensors there"):
        create(tmp_path)


def test_packing_refuses_what_does_not_fit(folder, create):
    policy, (group, *_) = create(folder), tiny.groups()
    group.prompt.expanded_ids.remove(tiny.IMAGE)
    with pytest.raises(EngineError, match="prompt one: the prompt holds 5 image tokens, but its images give 6 features"):
        policy.pack([group], None)
    group.prompt.expanded_ids.insert(9, tiny.IMAGE)
    group.responses[1].logprobs.append(0.0)
    with pytest.raises(EngineError, match="prompt one, response 1: 1 tokens, 2 log-probs"):
        policy.pack([group], None)


SAVER = """
import sys; sys.path.insert(0, sys.argv[1])
import tiny
from pathlib import Path
from sophiavl_fast.policy import Policy
from sophiavl_fast.policy.saver import Saver
policy = Policy.create(tiny.config(Path(sys.argv[2]), checkpoint={"format": sys.argv[5]}), reference=False, total_steps=1)
saver = Saver(policy, sys.argv[3], keep=1, background=sys.argv[4] == "1")
for step in range(1, 10_000):
    saver.save(step, {"step": step})
    if step > 1 or sys.argv[4] == "0":
        print(step - int(sys.argv[4]), flush=True)  # in the background, the one before is there
"""


@FORMATS
@pytest.mark.kill
def test_kill_while_saving_leaves_a_loadable_checkpoint(folder, create, tmp_path, form):
    for attempt in range(4):
        run = tmp_path / str(attempt)
        child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", SAVER, str(Path(__file__).parent), str(folder), str(run), str(attempt % 2), form],
                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        reported = int(child.stdout.readline())
        time.sleep(0.05 + 0.013 * attempt)
        os.kill(child.pid, signal.SIGKILL)
        reported = int((child.communicate()[0].split() or [reported])[-1])
        newest = checkpoint.newest(run)
        assert int(newest.name.removeprefix("step_")) >= reported
        assert checkpoint.load(create(folder), newest)["step"] >= reported
