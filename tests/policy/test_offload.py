"""Optimizer state that goes away between updates and comes back: the same numbers to the bit, and nothing left in its place meanwhile."""
import pytest
import tiny
import torch

from sophiavl_fast.errors import EngineError
from sophiavl_fast.policy import checkpoint
from sophiavl_fast.policy.checkpoint import whole
from sophiavl_fast.policy.checkpoint.folder import read_manifest


def loss(batch, logprob, entropy):
    value = -(batch.advantage.repeat_interleave(batch.cu_seqlens.diff()) * logprob).sum() / 50
    return value, value.detach()[None]


def trained(create, folder, offload, dtype, out, updates=3):
    """Statistics, norms, weights and a checkpoint of a run that rests after every update, and before the first."""
    policy = create(folder, model={"dtype": dtype}, policy={"offload_optimizer": offload})
    groups = tiny.groups()
    batches = policy.pack(groups, torch.linspace(-1, 1, sum(len(g.responses) for g in groups)))
    found = []
    policy.rest()
    for _ in range(updates):
        result = policy.update(batches, loss)
        policy.rest()
        found += [result.stats, torch.tensor(result.grad_norm), *policy.logprobs(batches)]
    checkpoint.save(policy, out, updates, {}, keep=1)
    policy.rest()
    return policy, batches, found + [t.clone() for _, t in policy.weights()]


def state(policy):
    return [t for part in policy.optimizer.chained_optimizers for s in part.optimizer.state.values() for t in s.values() if t.dim()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_changes_no_bit(create, folder, tmp_path, dtype):
    _, _, without = trained(create, folder, False, dtype, tmp_path / "without")
    _, batches, found = trained(create, folder, True, dtype, tmp_path / "with")
    assert all(torch.equal(a, b) for a, b in zip(found, without, strict=True))
    read = lambda name: whole.Reader(path := checkpoint.newest(tmp_path / name), read_manifest(path))
    a, b = read("with"), read("without")
    assert set(a.files) == set(b.files) and any(n.startswith("exp_avg_sq/") for n in a.files)
    assert all(torch.equal(a(n), b(n)) for n in a.files)
    after = []
    for name in ("with", "without"):
        other = create(folder, model={"dtype": dtype}, policy={"offload_optimizer": name == "with"})
        other.rest()     # resting when the checkpoint is loaded
        checkpoint.load(other, checkpoint.newest(tmp_path / name))
        after.append([other.update(batches, loss).stats, *(t.clone() for _, t in other.weights())])
    assert all(torch.equal(x, y) for x, y in zip(*after, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_left_while_it_rests(create, folder, tmp_path, dtype):
    policy, batches, _ = trained(create, folder, True, dtype, tmp_path, updates=1)
    assert all(not t.numel() for part in policy.optimizer.chained_optimizers for s in part.optimizer.state.values() for k, t in s.items() if k != "step")
    assert all(buffer.grad_data.untyped_storage().nbytes() == 0 for buffer in policy._wrapped.buffers)
    if dtype == "bfloat16":
        assert all(not p.numel() for part in policy.optimizer.chained_optimizers for g in part.optimizer.param_groups for p in g["params"])
    with pytest.raises(EngineError, match="given back"):
        next(policy.gradients())
    policy.rest()     # twice is once
    policy.wake()
    assert state(policy) and all(t.numel() for t in state(policy))
    assert all(buffer.grad_data.untyped_storage().nbytes() > 0 for buffer in policy._wrapped.buffers)
    policy.update(batches, loss)
    assert list(policy.gradients())
