"""grpo_loss at [512 x 2048] tokens and trust_advantage at [4096] responses, eager and in a CUDA graph, against naive torch and torch.compile."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import Bench, failures, relative


def grpo(bench: Bench) -> dict[str, Any]:
    """The trainer's defaults: old, reference and rollout log-probs and a watched entropy; loss and gradient."""
    from sophiavl_fast.kernels import grpo_loss

    rows, length = bench.size(512, 6), bench.size(2048, 9)
    tokens, sets = rows * length, bench.size(8, 2)            # 8 sets of 25 MB are more than the L2 holds
    bounds = torch.arange(0, tokens + 1, length, device=bench.device)
    advantage = bench.randn(rows)
    data = []
    for _ in range(sets):
        logprob = -bench.rand(tokens) * 2
        near = [logprob + bench.randn(tokens, scale=0.1) for _ in range(3)]
        data.append([logprob.requires_grad_(), *near, bench.rand(tokens)])

    def ours(i: int, ratio: str = "token", aggregate: str = "token") -> Tensor:
        logprob, old, ref, rollout, entropy = data[i]
        return grpo_loss(logprob, advantage, bounds, old_logprob=old, ref_logprob=ref, rollout_logprob=rollout, entropy=entropy, kl_coef=0.01,
                         denominator=float(tokens), ratio=ratio, aggregate=aggregate, backend=bench.backend)[0]

    def forward(i: int) -> Tensor:
        with torch.no_grad():
            return ours(i)

    both = lambda i: torch.autograd.grad(ours(i), data[i][0])[0]
    shared = lambda i: torch.autograd.grad(ours(i, "sequence", "sequence"), data[i][0])[0]
    size = 4 * tokens
    out: dict[str, Any] = {"shape": [rows, length]}
    # Reads five tensors; with the gradient writes one, and reads and writes it once more to scale it. Launches: the pass, the sum of its
    # partial sums, the scaling, and for a sequence's ratio a pass before.
    for name, run, passes, launches in (("forward", forward, 5, 2), ("both", both, 8, 3), ("both_sequence", shared, 10, 4)):
        out[name] = bench.rates(bench.eager(run, sets), bytes_=passes * size, launches=launches) | bench.peak(run)
        out[f"{name}_graph"] = bench.tried(lambda: bench.rates(bench.graph(run, sets, repeat=4), bytes_=passes * size, launches=launches))  # noqa: B023
    plain = lambda *x: _naive(*x, advantage, length)
    for name, make in (("naive", lambda: plain), ("torch.compile", lambda: bench.compiled(plain))):
        out[f"{name}_both"] = bench.tried(lambda: _peer(bench, make(), data, both, 7 * size))  # noqa: B023
    out["graph_replays_new_coefficients"] = bench.tried(lambda: _replay(bench, data[0], advantage, bounds))
    return out | ({"error": "; ".join(wrong)} if (wrong := failures(out)) else {})


def _peer(bench: Bench, function: Callable[..., Tensor], data: list[list[Tensor]], ours: Callable[[int], Tensor], bytes_: int) -> dict[str, Any]:
    run = lambda i: torch.autograd.grad(function(*data[i]), data[i][0])[0]
    assert (error := relative(run(0), ours(0))) < 1e-4, f"off by {error:.3g}"
    return bench.rates(bench.eager(run, len(data)), bytes_=bytes_) | bench.peak(run)


def _naive(logprob: Tensor, old: Tensor, ref: Tensor, rollout: Tensor, entropy: Tensor, advantage: Tensor, length: int) -> Tensor:
    """The same loss and statistics as trainers write them."""
    a = advantage.repeat_interleave(length)
    log_ratio = logprob - old
    ratio = log_ratio.exp()
    policy = torch.maximum(-ratio * a, -ratio.clamp(0.8, 1.2) * a)
    d = ref - logprob
    kl = d.exp() - d - 1
    with torch.no_grad():
        clipped = ((ratio < 0.8) & (a < 0)) | ((ratio > 1.2) & (a > 0))
        diff = (old - rollout).abs()
        watched = torch.stack([policy.sum(), kl.sum(), -log_ratio.sum(), entropy.sum(), ratio.sum(), ratio.max(), clipped.sum(), diff.sum(), diff.max()])
    return (policy + 0.01 * kl).sum() / len(logprob) + 0 * watched[0]


def _replay(bench: Bench, data: list[Tensor], advantage: Tensor, bounds: Tensor) -> dict[str, Any]:
    """A captured graph is replayed with another clip range and denominator in its 0-d tensors: it must give the new loss."""
    from sophiavl_fast.kernels import grpo_loss

    high, count = torch.tensor(0.2, device=bench.device), torch.tensor(100.0, device=bench.device)
    run = lambda: grpo_loss(data[0].detach(), advantage, bounds, old_logprob=data[1], clip_high=high, denominator=count, backend=bench.backend)[0]
    first = run().item()
    if bench.dry:
        high.fill_(0.01)
        return {"changed": run().item() != first}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = run()
    high.fill_(0.01)
    count.fill_(50.0)
    graph.replay()
    assert value.item() == run().item() != first, "a replayed graph does not see new coefficients"
    return {"changed": True}


def trust(bench: Bench) -> dict[str, Any]:
    """512 groups of 8. The naive peer is our own reference: dozens of small launches."""
    from sophiavl_fast.kernels import trust_advantage

    rows = bench.size(4096, 16)
    bounds = torch.arange(0, rows + 1, 8, device=bench.device)
    outcome, thinking = (bench.rand(rows) < 0.5).float(), bench.rand(rows)
    out: dict[str, Any] = {"shape": [rows, 8]}
    bytes_ = rows * (8 + 13 + 8)  # two inputs, four results, the exact rewards
    for normalize, launches in (("std", 1), ("batch", 2)):  # the second where a statistic of the whole batch is needed
        for name, backend in (("ours", bench.backend), ("naive", "reference")):
            run = lambda i: trust_advantage(outcome, thinking, bounds, normalize=normalize, backend=backend)  # noqa: B023
            out[f"{name}_{normalize}"] = bench.rates(bench.eager(run, 1), bytes_=bytes_, launches=launches)
            if name == "ours":
                graph = lambda: bench.rates(bench.graph(run, 1, repeat=20), bytes_=bytes_, launches=launches)  # noqa: B023
                out[f"{name}_{normalize}_graph"] = bench.tried(graph)
    compiled = bench.compiled(lambda o, t: trust_advantage(o, t, bounds, backend="reference")[:2])
    out["torch.compile_std"] = bench.tried(lambda: bench.rates(bench.eager(lambda i: compiled(outcome, thinking), 1), bytes_=bytes_, launches=1))
    return out | ({"error": "; ".join(wrong)} if (wrong := failures(out)) else {})
