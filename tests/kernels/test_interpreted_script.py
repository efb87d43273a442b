"""TRITON_INTERPRET=1 in a script of one's own, as a wish for backend="triton" on a CPU recommends: no test's help, every op, no warning."""
from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
SCRIPT = """
import torch
from sophiavl_fast.kernels import grpo_loss, linear_logprob, logits_logprob, trust_advantage

torch.manual_seed(0)
target, bounds, groups = torch.tensor([0, 6, -100, 2]), torch.tensor([0, 1, 4]), torch.tensor([0, 2, 4])
hidden, weight = torch.randn(4, 16).bfloat16().requires_grad_(), torch.randn(7, 16).bfloat16().requires_grad_()
leaf = torch.randn(4, 7).bfloat16().requires_grad_()
old, outcome, thinking = torch.tensor([-0.1, -200.0, -0.7, -2.0]), torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.2, 0.9, 0.4, 0.4])


def results(backend):
    logprob, entropy = linear_logprob(hidden, weight, target, entropy=True, backend=backend)
    direct, _ = logits_logprob(leaf, target, backend=backend)
    loss, stats = grpo_loss(logprob, torch.tensor([1.0, -1.0]), bounds, old_logprob=old, dual_clip=3.0, ratio="sequence", backend=backend)
    trust = trust_advantage(outcome, thinking, groups, normalize="batch", uniform="center", backend=backend)
    return [logprob, entropy, direct, loss, stats, *trust, *torch.autograd.grad(loss + direct.sum() + entropy.sum(), (hidden, weight, leaf))]


for got, want in zip(results("triton"), results("reference"), strict=True):
    torch.testing.assert_close(got, want, rtol=2e-2 if got.dtype == torch.bfloat16 else 1e-5, atol=1e-2 if got.dtype == torch.bfloat16 else 1e-5)
print("the same")
"""


def test_every_op_runs_in_a_script(tmp_path):
    run = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert (run.returncode, run.stdout) == (0, "the same\n"), run.stderr[-2000:]
