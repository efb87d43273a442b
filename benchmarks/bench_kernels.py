"""linear_logprob on a CPU under pytest-benchmark: `pytest benchmarks/bench_kernels.py [--benchmark-json FILE]`.

A quick look at the contestants of `kernels_cpu.py`, one after the other. What is published comes from there, where they take turns and memory is read too.
"""
from __future__ import annotations

import pytest
import torch

from benchmarks.kernels_cpu import SHAPES, contestants

pytest.importorskip("pytest_benchmark")
CONTESTANTS = contestants("build/trl")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["demo", "middle"])
def test_linear_logprob(benchmark, shape, dtype, name, backward):
    tokens, width, vocab = SHAPES[shape]
    hidden, weight = (torch.randn(n, width).to(dtype).requires_grad_() for n in (tokens, vocab))
    target, upstream = torch.randint(0, vocab, (tokens,)), torch.randn(tokens)

    def run():
        with torch.set_grad_enabled(backward):
            logprob = CONTESTANTS[name](hidden, weight, target)
            if backward:
                torch.autograd.grad(logprob, (hidden, weight), upstream.to(logprob.dtype))

    benchmark.group = f"{shape} {tokens} x {width} x {vocab} {dtype} {'both' if backward else 'forward'}"
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
