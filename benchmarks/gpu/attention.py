"""Grouped attention over a packed row of shared prompts: torch's variable-length attention, flash-attn's where installed, padded SDPA, flex attention."""
from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import Bench, failures, relative

HEADS, KEYS, WIDTH = 16, 2, 128     # Qwen2.5-VL-3B
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Text:
    """A family whose prompts are text: position = index."""

    positions = staticmethod(lambda tokens, grid, where: (torch.arange(len(tokens)).expand(3, -1), len(tokens)))


def row(groups: int, prompt: int, response: int, n: int) -> Any:
    """A packed row of `groups` groups, each [prompt | n ragged responses of about `response` tokens]; a Batch on the CPU."""
    from sophiavl_fast.policy.packing import pack
    from sophiavl_fast.types import Group, Prompt, Response

    g, made = torch.Generator().manual_seed(0), []
    for i in range(groups):
        answers = []
        for _ in range(n):
            length = max(1, int(response * (0.75 + 0.5 * torch.rand((), generator=g))))
            answers.append(Response(token_ids=[1] * length, logprobs=[0.0] * length, text="", finish_reason="length", seed=0, weight_versions=[0] * length))
        asked = Prompt(id=str(i), dataset="", problem_type="", question="", gold="", expanded_ids=[1] * prompt)
        made.append(Group(prompt=asked, responses=answers))
    (batch,) = pack(made, None, _Text, share_prompt=True, budget=10 ** 9, multiple=1)
    return batch


def labels(batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Group and part (0: prompt, i + 1: response i) of every token, [S] each: i sees j <= i of its group where j's part is 0 or its own."""
    size = len(batch.tokens)
    group, part = torch.full((size,), -1), torch.zeros(size, dtype=torch.int64)
    for g in range(len(batch.prompt_len)):
        group[batch.group_start[g]:batch.group_start[g + 1]] = g
    for i, start in enumerate(batch.response_start):
        part[start:start + batch.cu_seqlens[i + 1] - batch.cu_seqlens[i]] = i + 1
    return group.to(device), part.to(device)


def run(bench: Bench) -> dict[str, Any]:
    """n = 8 at P:R = 1:1, 4:1, 16:1. Exactness against SDPA with a dense fp64 mask on a short row, time on a long one, forward and backward, eager
    and in a CUDA graph. A path that fails is one line of `error`; the others go on."""
    out: dict[str, Any] = {"exact": _exact(bench)} | {f"{ratio}:1": _timed(bench, ratio) for ratio in ((1,) if bench.dry else (1, 4, 16))}
    return out | ({"error": "; ".join(wrong)} if (wrong := failures(out)) else {})


def _paths(bench: Bench, batch: Any) -> dict[str, Callable[[], Attention]]:
    """query [S, A, D], key and value [S, K, D] -> [S, A * D], by each implementation; made where it is called."""
    from sophiavl_fast.policy import attention

    device, dtype = bench.device, bench.dtype

    def padded() -> Attention:
        plan = attention.plan_row(batch, device=device, dtype=torch.float32, query_heads_per_key=HEADS // KEYS)
        for bucket in plan.buckets:
            bucket.bias = bucket.bias.to(dtype)
        return lambda q, k, v: attention.attend(q, k, v, plan)

    def flex() -> Attention:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        group, part = labels(batch, device)
        size = len(batch.tokens)
        allowed = lambda b, h, q, k: (q >= k) & (group[q] == group[k]) & ((part[k] == 0) | (part[q] == part[k]))
        blocks = create_block_mask(allowed, None, None, size, size, device=str(device))
        run_ = flex_attention if bench.dry else torch.compile(flex_attention, dynamic=False)
        heads = lambda x: x.transpose(0, 1)[None]
        return lambda q, k, v: run_(heads(q), heads(k), heads(v), block_mask=blocks, enable_gqa=True)[0].transpose(0, 1).flatten(1)

    def flash(name: Any) -> Attention:
        plan = attention.plan_row(batch, device=device, dtype=dtype, query_heads_per_key=HEADS // KEYS, flash=name)
        assert plan.flash == name
        return lambda q, k, v: attention.attend(q, k, v, plan)

    here = [] if bench.dry else ["varlen", *(["flash_attn"] if importlib.util.find_spec("flash_attn") else [])]   # they want CUDA
    return {name: functools.partial(flash, name) for name in here} | {"padded_sdpa": padded, "flex": flex}


def _inputs(bench: Bench, size: int) -> tuple[list[Tensor], Tensor]:
    return [bench.randn(size, n, WIDTH, dtype=bench.dtype).requires_grad_() for n in (HEADS, KEYS, KEYS)], bench.randn(size, HEADS * WIDTH, dtype=bench.dtype)


def _each(bench: Bench, batch: Any, look: Callable[[str, Attention], dict[str, Any]]) -> dict[str, Any]:
    """look(name, path) of every path, or how it failed."""
    return {name: bench.tried(lambda: look(name, make())) for name, make in _paths(bench, batch).items()}  # noqa: B023


def _exact(bench: Bench) -> dict[str, Any]:
    batch = row(2, bench.size(200, 9), bench.size(100, 6), 4)
    (q, k, v), upstream = _inputs(bench, len(batch.tokens))
    group, part = labels(batch, bench.device)
    causal = torch.ones(len(group), len(group), dtype=torch.bool, device=bench.device).tril()
    mask = (group[:, None] == group) & ((part == 0) | (part[:, None] == part)) & causal
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    spread = lambda x: x.transpose(0, 1).repeat_interleave(HEADS // x.shape[1], 0)
    scores = spread(wide[0]) @ spread(wide[1]).transpose(1, 2) * WIDTH ** -0.5
    want = (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ spread(wide[2])).transpose(0, 1).flatten(1)
    exact = (want, *torch.autograd.grad(want, wide, upstream.double()))

    def look(name: str, path: Attention) -> dict[str, Any]:
        if bench.dry and name == "flex":  # it has no gradient on a CPU
            return {"worst": relative(path(*(x.detach() for x in (q, k, v))), want)}
        got = path(q, k, v)
        made = (got, *torch.autograd.grad(got, (q, k, v), upstream))
        error = max(relative(a, b) for a, b in zip(made, exact))
        assert error < (1e-5 if bench.dry else 2e-2), f"relative error {error:.3g}"
        return {"worst": error}

    return _each(bench, batch, look)


def _timed(bench: Bench, ratio: int) -> dict[str, Any]:
    response, n = bench.size(512, 4), 8
    batch = row(bench.size(max(1, 8 // ratio), 1), ratio * response, response, n)
    (q, k, v), upstream = _inputs(bench, len(batch.tokens))
    flops = 4 * _pairs(batch) * HEADS * WIDTH                       # two products a visible pair

    def look(name: str, path: Attention) -> dict[str, Any]:
        if bench.dry and name == "flex":
            return {}
        forward = lambda i: path(q, k, v)
        both = lambda i: torch.autograd.grad(path(q, k, v), (q, k, v), upstream)
        return {"forward": bench.tried(lambda: bench.rates(bench.eager(forward, 1), flops=flops)),
                "both": bench.tried(lambda: bench.rates(bench.eager(both, 1), flops=3.5 * flops) | bench.peak(both)),
                "forward_graph": bench.tried(lambda: bench.rates(bench.graph(forward, 1), flops=flops)),
                "both_graph": bench.tried(lambda: bench.rates(bench.graph(both, 1), flops=3.5 * flops))}

    return {"tokens": len(batch.tokens), "prompt": ratio * response, "response": response, "n": n} | _each(bench, batch, look)


def _pairs(batch: Any) -> int:
    """Visible (query, key) pairs of the row."""
    prompts = batch.prompt_len
    lengths = batch.cu_seqlens.diff()
    return int((prompts * (prompts + 1) // 2).sum() + (lengths * prompts[batch.group_of] + lengths * (lengths + 1) // 2).sum())
