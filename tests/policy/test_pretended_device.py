"""The policy on a CUDA device that is not there (tests/pretend_cuda.py): nothing lies on the wrong device, and the numbers are the CPU's.

The kernels run their reference here (Triton under its interpreter: test_pretended_kernels.py); what a GPU alone can show stays with benchmarks/gpu_suite.py.
"""
import pytest
import tiny
import torch
import zoo

from sophiavl_fast.algorithms import losses
from sophiavl_fast.kernels.dispatch import resolve
from sophiavl_fast.policy import Policy, checkpoint
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
    tree = {"policy": {"kernels": "reference", "offload_optimizer": offload, "tokens_per_row": 100} | sections.pop("policy", {}),
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


@pytest.mark.parametrize("share,loss,offload", [(True, "plain", True), (False, "kl and entropy", False), (True, "capped", False)])
def test_rl_update(folders, tmp_path, share, loss, offload):
    options = {"groups": tiny.groups(), "algorithm": LOSSES[loss], "offload": offload, "policy": {"share_prompt": share}}
    expected = a_run(folders["qwen2_5_vl"], "cpu", tmp_path / "cpu", **options)
    with pretended_cuda() as pretence:
        found = a_run(folders["qwen2_5_vl"], "cuda", tmp_path / "cuda", **options)
    same(found, expected)
    assert pretence.syncs


def test_mistakes_are_caught():
    with pretended_cuda() as pretence:
        there, here = torch.arange(4.0, device="cuda"), torch.arange(4.0)
        print(pretence.syncs)
        for wrong in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here.add_(there), lambda: here[there.long()]):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
