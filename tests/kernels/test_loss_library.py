"""grpo_loss and trust_advantage as citizens of PyTorch: torch.library, torch.compile, activation checkpointing, autocast.

Backends that run on a CPU: the reference here; Triton's interpreted kernels through the same tests, imported by
tests/kernels/interpreter/test_loss_library.py.
"""
from __future__ import annotations

import os

import pytest
import torch
from sophiavl_fast.kernels import STATS, grpo_loss, trust_advantage
from sophiavl_fast.kernels.loss_ops import CHOICES, COEFFICIENTS, TENSORS
from torch.utils.checkpoint import checkpoint

BACKEND = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "reference"
BOUNDS = torch.tensor([0, 3, 3, 7, 13])
T, B = 13, 4


def options(**change):
    g = torch.Generator().manual_seed(2)
    near = lambda: -torch.rand(T, generator=g) - 0.1
    made = {
        "old_logprob": near(), "ref_logprob": near(), "rollout_logprob": near(), "mask": torch.rand(T, generator=g) < 0.8, "kl_coef": 0.1, "tis_cap": 1.5,
        "entropy": torch.rand(T, generator=g), "entropy_coef": 0.05, "denominator": torch.tensor(13.0), "backend": BACKEND,
    }
    return made | change


def logprob():
    return (-torch.rand(T, generator=torch.Generator().manual_seed(7)) - 0.1).requires_grad_()


ADVANTAGE = torch.tensor([1.0, -0.5, 0.3, -2.0])


def op_arguments(entropy, *, sequence, tensors):
    o = options()
    values = {"denominator": 13.0, "clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.1, "tis_cap": 1.5, "entropy_coef": 0.05}
    kinds = "".join("-" if name not in values else "t" if tensors else "n" for name in COEFFICIENTS)
    numbers = [0.0 if tensors else values.get(name, 0.0) for name in COEFFICIENTS]
    given = [torch.tensor(values[name]) if tensors and name in values else None for name in COEFFICIENTS]
    choices = {"variant": "ppo", "ratio": "sequence" if sequence else "token", "aggregate": "sequence" if sequence else "token", "kl": "k3"}
    optional = [entropy if name == "entropy" else o.get(name) for name in TENSORS]
    return (logprob(), ADVANTAGE, BOUNDS, *optional, kinds, numbers, *given, *(choices[name] for name in CHOICES), True, entropy.requires_grad, BACKEND)


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("sequence", [False, True])
def test_opcheck_of_the_loss(sequence, tensors):
    """Schema, fake tensors, autograd registration and AOT dispatch with the op's own checks."""
    entropy = torch.rand(T).requires_grad_(sequence)
    torch.library.opcheck(torch.ops.sophiavl.grpo_loss, op_arguments(entropy, sequence=sequence, tensors=tensors))


@pytest.mark.parametrize("normalize", ["std", "batch"])
def test_opcheck_of_trust(normalize):
    arguments = (torch.tensor([1.0, 0.0, 0.3]), torch.rand(3), torch.tensor([0, 2, 3]), "nntn" if normalize == "batch" else "nnt-", [0.3, 1.0, 0.0, 3.0],
                 None, None, torch.tensor(0.5), None, "paper", "score", 1.0, normalize, 1e-6, BACKEND)
    torch.library.opcheck(torch.ops.sophiavl.trust_advantage, arguments)


OPTIONS = options()


def loss_of(x, entropy, **change):
    return grpo_loss(x * 1.0, ADVANTAGE, BOUNDS, **OPTIONS | {"entropy": entropy} | change)


def gradients(run, *args):
    x, entropy = logprob(), torch.rand(T, generator=torch.Generator().manual_seed(3)).requires_grad_()
    value, stats = run(x, entropy, *args)
    (2 * value).backward()
    return value.detach(), stats, x.grad, entropy.grad


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, equal_nan=True)


def test_compiles_in_one_graph_and_keeps_its_gradient():
    """fullgraph would raise at a break; the frame is counted, so that a disabled dynamo cannot pass."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    assert_equal(gradients(compiled), gradients(loss_of))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    gradients(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # nothing is compiled anew for the same call


def test_trust_compiles_in_one_graph():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = lambda outcome, thinking: trust_advantage(outcome * 1.0, thinking, torch.tensor([0, 3, 5]), anneal=torch.tensor(0.5), backend=BACKEND)
    made = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0]), torch.tensor([0.1, 0.9, 0.3, 0.4, 0.8])
    assert_equal(torch.compile(run, backend="aot_eager", fullgraph=True)(*made), run(*made))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    run = lambda x, entropy: checkpoint(loss_of, x, entropy, use_reentrant=reentrant)
    assert_equal(gradients(run), gradients(loss_of))


def test_autocast_changes_nothing():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(loss_of)
    assert got[0].dtype == torch.float32
    assert_equal(got, gradients(loss_of))


def test_only_the_loss_is_differentiable_and_only_once():
    x = logprob()
    value, stats = loss_of(x, torch.rand(T))
    assert not stats.requires_grad and len(stats) == len(STATS)
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="grpo_loss: second derivatives are not implemented"):
        first.sum().backward()


def test_no_gradient_is_computed_where_none_is_wanted():
    """Without recording, and for an entropy that is only watched, the op returns empty gradients: nothing was written."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.sophiavl.grpo_loss.default:
                seen.append(tuple(len(x) for x in out[2:]))
            return out

    watched = torch.rand(T).requires_grad_()
    with Watch():
        loss_of(logprob(), watched)
        loss_of(logprob(), watched, entropy_coef=0.0)
        with torch.no_grad():
            loss_of(logprob(), watched)
    assert seen == [(T, T), (T, 0), (0, 0)]


def test_trust_is_a_constant_to_autograd():
    outcome = torch.tensor([1.0, 0.0]).requires_grad_()
    with torch.no_grad():
        assert not any(x.requires_grad for x in trust_advantage(outcome, torch.tensor([0.2, 0.4]), torch.tensor([0, 2]), backend=BACKEND))
