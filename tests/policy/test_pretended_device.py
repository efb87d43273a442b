"""The policy on a CUDA device that is not there (tests/pretend_cuda.py): nothing lies on the wrong device, and the numbers are the CPU's.

The kernels run their reference here (Triton under its interpreter: test_pretended_kernels.py); what a GPU alone can show stays with benchmarks/gpu_suite.py.
"""
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
import zoo
from safetensors.torch import load_file

from sophiavl_fast.algorithms import losses
from sophiavl_fast.errors import EngineError
from sophiavl_fast.policy import Policy, checkpoint
from sophiavl_fast.recipes import ranks
from sophiavl_fast.recipes.probe import Probe
from tests.pretend_cuda import CUDA, pretended_cuda

LOSSES = {
    "plain": {},
    "kl and entropy": {"kl_coef": 0.04, "entropy_coef": 0.01},
    "capped": {"mismatch_cap": 4.0, "tis_cap": 2.0, "dual_clip": 3.0, "pre_clip": 1.0, "aggregate": "sequence"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: zoo.build(kind, tmp_path_factory.mktemp("pretended") / kind) for kind in zoo.FAMILIES}


def a_run(folder, device, out, *, groups, algorithm=None, sft=False, offload=False, **sections):
    """Everything a recipe asks of a policy, twice over a checkpoint; what came out, as CPU tensors by name, and the syncs of the second update."""
    tree = {"policy": {"kernels": "reference", "offload_optimizer": offload, "tokens_per_row": 160} | sections.pop("policy", {}),
            "algorithm": {"name": "trust_grpo"} | (algorithm or {}), "debug": {"check_batches": True},
            "optim": {"eps": 1e-2}, **sections}  # else Adam makes steps of the rounding of gradients that are nearly 0
    config = tiny.config(folder, **tree).model_copy(update={"device": device})
    found, device = {}, torch.device(device if device == "cpu" else CUDA)
    advantages = torch.linspace(-1, 1, sum(len(g.responses) for g in groups))
    advantages[3] = 0
    for part in ("first", "resumed"):
        policy = Policy.create(config, banned_ids=[1, 115], temperature=0.8, reference=not sft, total_steps=5)
        try:
            assert all(p.device == device for p in policy.model.parameters())
            policy.rest()
            if part == "resumed":
                checkpoint.load(policy, out / "checkpoints/step_1")
            batches = policy.pack(groups, None if sft else advantages)
            own = policy.logprobs(batches)
            assert all(lp.device == device for lp in own)
            found[f"{part} logprobs"] = torch.cat(own)
            if not sft:
                reference = policy.logprobs(batches, reference=True)
                found[f"{part} reference"] = torch.cat(reference)
                for batch, old, ref in zip(batches, own, reference):
                    batch.old_logprob, batch.ref_logprob = old, ref
                count = policy.sum_over_replicas(losses.denominator(batches, config))
                result = policy.update(batches, losses.make_grpo_loss(config, count), entropy=True, active=lambda b: losses.active_rows(b, config))
                found[f"{part} metrics"] = torch.tensor(list(losses.metrics(result.stats, config).values()))
                if offload:  # moments that were away and came back
                    policy.rest()
                    result = policy.update(batches, losses.make_grpo_loss(config, count), entropy=True)
            else:
                result = policy.update(batches, losses.sft_loss(policy.sum_over_replicas(losses.token_count(batches))))
            found |= {f"{part} stats": result.stats, f"{part} norm": torch.tensor(result.grad_norm)}
            if not offload:
                found |= {f"{part} gradient of {name}": t for name, t in policy.gradients()}
            policy.rest()
            found |= {f"{part} {name}": t.clone() for name, t in policy.weights()}
            if part == "first":
                checkpoint.save(policy, out, 1, {}, keep=1)
                policy.rest()
                policy.export(out / "hf")
        finally:
            policy.close()
    return {name: t.cpu().double() for name, t in found.items()}


def same(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    worst = {name: (found[name] - expected[name]).nan_to_num(0).abs().max().item() / max(1, expected[name].nan_to_num(0).abs().max().item()) for name in found}
    assert all(torch.equal(found[n].isnan(), expected[n].isnan()) for n in found)
    assert max(worst.values()) <= tolerance, sorted(worst.items(), key=lambda x: -x[1])[:5]


@pytest.mark.parametrize("kind,share,loss,offload", [
    ("qwen2_5_vl", True, "plain", True), ("qwen3_vl", True, "capped", False), ("internvl3", False, "plain", False),
    pytest.param("qwen2_5_vl", False, "kl and entropy", False, marks=pytest.mark.slow),
    pytest.param("qwen2_5_vl", True, "capped", False, marks=pytest.mark.slow), pytest.param("qwen3_vl", False, "plain", True, marks=pytest.mark.slow),
    pytest.param("internvl3", False, "kl and entropy", True, marks=pytest.mark.slow)])
def test_rl_update(folders, tmp_path, kind, share, loss, offload):
    """Prompts with one image, many and none: log-probs, the reference's, statistics, gradients, weights, a checkpoint, an export."""
    options = {"groups": zoo.groups(kind), "algorithm": LOSSES[loss], "offload": offload, "policy": {"share_prompt": share},
               "checkpoint": {"format": "safetensors" if kind == "qwen3_vl" else "torch_dist"}}
    expected = a_run(folders[kind], "cpu", tmp_path / "cpu", **options)
    with pretended_cuda():
        found = a_run(folders[kind], "cuda", tmp_path / "cuda", **options)
    same(found, expected)
    cpu, cuda = (load_file(tmp_path / device / "hf/model.safetensors") for device in ("cpu", "cuda"))
    same({n: t.double() for n, t in cuda.items()}, {n: t.double() for n, t in cpu.items()})


@pytest.mark.parametrize("setting", [
    pytest.param({}, marks=pytest.mark.slow, id="fine-tuning"), pytest.param({"policy": {"recompute": True}}, marks=pytest.mark.slow, id="recompute"),
    pytest.param({"model": {"freeze_vision": True, "dtype": "float32"}, "policy": {"offload_reference": True}}, marks=pytest.mark.slow, id="frozen")])
def test_other_settings(folders, tmp_path, setting):
    options = {"groups": tiny.groups(), "sft": not setting} | setting
    expected = a_run(folders["qwen2_5_vl"], "cpu", tmp_path / "cpu", **options)
    with pretended_cuda():
        found = a_run(folders["qwen2_5_vl"], "cuda", tmp_path / "cuda", **options)
    same(found, expected)


def attention_by_hand(query, key, value, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa):
    """What torch's varlen_attn computes, which only CUDA has: causal, aligned to the end."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and window_size == (-1, 0) and enable_gqa == (query.shape[1] != key.shape[1])
    assert query.is_cuda and cu_q.is_cuda and cu_k.is_cuda and isinstance(max_q, int) and isinstance(max_k, int)
    rows = []
    for q, k in zip(range(len(cu_q) - 1), range(len(cu_k) - 1), strict=True):
        a, b = slice(cu_q[q], cu_q[q + 1]), slice(cu_k[k], cu_k[k + 1])
        n, m = a.stop - a.start, b.stop - b.start
        assert 0 < n <= max_q and 0 < m <= max_k
        seen = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
        parts = (x.transpose(0, 1)[None] for x in (query[a], key[b], value[b]))
        rows.append(F.scaled_dot_product_attention(*parts, attn_mask=seen, enable_gqa=enable_gqa)[0])
    return torch.cat(rows, 1).transpose(0, 1)


def attention_of_torch_2_11(query, key, value, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    """Its arguments: no grouped queries."""
    assert query.shape[1] == key.shape[1] == value.shape[1], "as many key heads as query heads"
    return attention_by_hand(query, key, value, cu_q, cu_k, max_q, max_k, window_size=window_size, enable_gqa=False)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False):
    """The package's first arguments: grouped queries as they are, causal aligned to the end."""
    assert causal and not dropout_p and softmax_scale is None
    return attention_by_hand(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1])


def not_to_be_asked(*args, **kwargs):
    raise AssertionError("the other attention was asked for")


@pytest.mark.parametrize(("varlen", "package"), [(attention_by_hand, None), (attention_of_torch_2_11, None), (not_to_be_asked, flash_attn_varlen_func)])
def test_bf16_takes_flash_attention(folders, tmp_path, monkeypatch, varlen, package):
    """bf16 goes another way on a GPU: variable-length attention instead of padded buckets, and fp32 main weights beside the model's."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    monkeypatch.setitem(sys.modules, "flash_attn", package and SimpleNamespace(flash_attn_varlen_func=package, __version__="2.8.3"))
    options = {"groups": tiny.groups()[1:], "model": {"dtype": "bfloat16"}, "offload": True}
    expected = a_run(folders["qwen2_5_vl"], "cpu", tmp_path / "cpu", **options)
    with pretended_cuda():
        found = a_run(folders["qwen2_5_vl"], "cuda", tmp_path / "cuda", policy={"attention": "flash_attn"} if package else {}, **options)
    keys = ("first logprobs", "first reference", "first norm", "resumed logprobs")
    same({k: found[k] for k in keys}, {k: expected[k] for k in keys}, 2e-2)


@pytest.mark.parametrize("kind", zoo.FAMILIES)
def test_compare_hf(folders, kind):
    with pretended_cuda():
        config = tiny.config(folders[kind], policy={"kernels": "reference", "tokens_per_row": 100}).model_copy(update={"device": "cuda"})
        policy = Policy.create(config, banned_ids=[1, 115], temperature=0.8, reference=False, total_steps=5)
        try:
            batches = policy.pack(zoo.groups(kind), None)
            assert policy.compare_hf(batches, policy.logprobs(batches)) < 1e-5
        finally:
            policy.close()


def test_host_syncs_of_an_update(folders):
    """Printed, line by line, to be read with -s; only what costs nothing is asserted: the step's loss and log-prob head make none."""
    config = tiny.config(folders["qwen2_5_vl"], policy={"kernels": "reference"}, algorithm={"name": "trust_grpo", "kl_coef": 0.04})
    config = config.model_copy(update={"device": "cuda"})
    with pretended_cuda() as pretence:
        policy = Policy.create(config, banned_ids=[1], reference=True, total_steps=5)
        try:
            groups = tiny.groups()
            batches = policy.pack(groups, torch.linspace(-1, 1, sum(len(g.responses) for g in groups)))
            for batch, ref in zip(batches, policy.logprobs(batches, reference=True)):
                batch.ref_logprob = ref
            loss = losses.make_grpo_loss(config, policy.sum_over_replicas(losses.denominator(batches, config)))
            for _ in range(2):
                with pretence.since() as found:
                    policy.update(batches, loss, entropy=True)
        finally:
            policy.close()
    print(f"\n{len(batches)} micro-batches; syncs:")   # `pytest -s` shows them
    for (kind, ours, asked), count in sorted(found.items(), key=lambda x: x[0][1:]):
        print(f"{count:5d} {kind:22s} {ours}" + (f"  <- {asked}" if asked != ours else ""))
    assert not [key for key in found if "kernels/" in key[1] or "algorithms/" in key[1]]


def test_the_probe_after_a_transfer(folders):
    """rollout.staleness: log-probs of fresh samples on the device against the engine's, which lie on the CPU."""
    config = tiny.config(folders["qwen2_5_vl"], policy={"kernels": "reference"}, rollout={"max_logprob_diff": 100.0}).model_copy(update={"device": "cuda"})
    with pretended_cuda():
        policy = Policy.create(config, reference=False, total_steps=5)
        try:
            recorded = SimpleNamespace(generate=lambda prompts, **_: tiny.groups()[:1])
            probe = Probe(config, policy, ranks.Lead(recorded, policy))
            found = probe.compare(tiny.groups(), 1)
            assert 0 < found < 100
            config.rollout.max_logprob_diff = found / 2     # asked for before, compared a step later
            probe.ask(tiny.groups(), 1)
            with pytest.raises(EngineError, match="step 2: trainer and rollout engine disagree on a sampled token's log-prob by"):
                probe.compare(tiny.groups(), 2)
        finally:
            policy.close()
