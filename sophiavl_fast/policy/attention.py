"""Attention over packed groups: every response sees its prompt and itself, nothing else.

A row is cut into segments in packed order (a prompt, or one response), so queries need no reordering; a segment's keys
are its context (nothing for a prompt, the prompt for a response) followed by itself, and the causal mask is aligned to
the end. That is exact, and the work is the sum of |segment| x |keys|, never the square of the row. Keys are gathered,
so no kernel needs to know about shared prompts (or, under context parallelism, about other ranks' tokens: context.py):
  * on a CPU, and in fp32 anywhere, segments of similar shape are padded together and go through SDPA with a mask;
  * on a GPU in bf16/fp16, a variable-length flash attention takes them as they are: torch's, or flash-attn's (`policy.attention`).
"""
from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.version import Version
from torch import Tensor

from sophiavl_fast.errors import UserError
from sophiavl_fast.policy.context import Slice
from sophiavl_fast.types import Batch


@dataclass(slots=True)
class Bucket:
    """n segments padded to Q queries and K keys: queries [n*Q] and keys [n*K] are rows of the packed row."""

    size: int
    queries: Tensor
    keys: Tensor
    bias: Tensor      # [n, 1, heads a key head * Q, K], 0 or -inf


@dataclass(kw_only=True)
class RowPlan(PackedSeqParams):
    """How a row attends. It rides through megatron's layers as their `packed_seq_params`, with a format that none of them acts on."""

    qkv_format: str = "groups"
    buckets: list[Bucket]
    place: Tensor                 # [S] where each row's output lies in the buckets' concatenation
    flash: Literal["varlen", "flash_attn"] | None   # which takes the segments as they are; None: padded buckets
    key_rows: Tensor | None = None  # [sum of K] rows gathered as keys (flash)
    deepstack: Any = None         # what the first layers add at image tokens, see deepstack.py
    active: Tensor | None = None  # [A] targets of this rank whose log-prob needs a backward pass; None: all of them
    slice: Slice | None = None    # this rank's part of the row under context parallelism; S above is then its length


@dataclass(slots=True)
class Segments:
    """[N] each: queries are rows begin..begin+length of what this rank holds, in that order; their keys are the context's rows of the packed
    row, then `before` rows from own_start on, then themselves."""

    begin: Tensor
    length: Tensor
    context_start: Tensor
    context: Tensor
    own_start: Tensor
    before: Tensor

    @property
    def keys(self) -> Tensor:
        return self.context + self.before + self.length

    def __getitem__(self, members: Tensor) -> Segments:
        return Segments(*(getattr(self, f.name)[members] for f in fields(self)))


def plan_row(batch: Batch, *, device: torch.device, dtype: torch.dtype, query_heads_per_key: int, part: Slice | None = None,
             active: Tensor | None = None, flash: Literal["varlen", "flash_attn"] = "varlen") -> RowPlan:
    """Cut a row (boundaries on the CPU) into segments and lay out their attention on `device`; `part`: of this rank's slice of it.

    flash: what computes it where segments need no padding (a GPU in bf16/fp16)."""
    segments = _segments(batch) if part is None else _within(_segments(batch), part)
    place_of_key = None if part is None else part.gathered
    common: dict[str, Any] = {"slice": None if part is None else part.to(device), "active": None if active is None else active.to(device)}
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return RowPlan(
            buckets=[], place=torch.empty(0), flash=flash, key_rows=_in_order(_key_rows(segments), place_of_key).to(device), **common,
            cu_seqlens_q=_cumulative(segments.length, device), cu_seqlens_kv=_cumulative(segments.keys, device),
            max_seqlen_q=int(segments.length.max()), max_seqlen_kv=int(segments.keys.max()),
        )
    buckets, place, done = [], torch.empty(int(segments.length.sum()), dtype=torch.int64), 0
    for members in _similar(segments.length, segments.keys):
        some = segments[members]
        width = int(some.length.max())
        inside = torch.arange(width) < some.length[:, None]
        place[(some.begin[:, None] + torch.arange(width))[inside]] = done + inside.flatten().nonzero()[:, 0]
        done += inside.numel()
        buckets.append(_bucket(some, place_of_key, query_heads_per_key, dtype, device))
    return RowPlan(buckets=buckets, place=place.to(device), flash=None, **common)


def _segments(batch: Batch) -> Segments:
    """Every non-empty segment, in packed order; padding is a segment of its own."""
    starts, prompts = batch.group_start[:-1], batch.prompt_len
    end, total = int(batch.group_start[-1]), len(batch.tokens)
    none = torch.zeros_like(prompts)
    pad = torch.tensor([[end], [total - end], [0], [0]])
    responses = torch.stack([
        batch.response_start, batch.cu_seqlens.diff(), starts[batch.group_of], prompts[batch.group_of],
    ])
    table = torch.cat([torch.stack([starts, prompts, none, none]), responses, pad], 1)
    table = table[:, table[1] > 0]
    start, length, context_start, context = table[:, table[0].argsort()].unbind(0)
    return Segments(start, length, context_start, context, start, torch.zeros_like(start))


def _within(segments: Segments, part: Slice) -> Segments:
    """What of each segment lies in this rank's chunks, as segments whose queries are counted in the rank's own rows."""
    pieces = []
    for low, high in part.chunks:
        begin, end = segments.begin.clamp(min=low), (segments.begin + segments.length).clamp(max=high)
        piece = Segments(begin, end - begin, segments.context_start, segments.context, segments.own_start, begin - segments.begin)
        pieces.append(piece[(end > begin).nonzero()[:, 0]])
    joined = Segments(*(torch.cat([getattr(piece, f.name) for piece in pieces]) for f in fields(Segments)))
    joined.begin = part.local[joined.begin]
    return joined


def _similar(queries: Tensor, keys: Tensor) -> list[Tensor]:
    """Members of each bucket: shapes rounded up to four steps an octave, so that padding wastes little."""
    shape = torch.stack([_rounded(queries), _rounded(keys)], 1)
    kinds, kind = shape.unique(dim=0, return_inverse=True)
    return [(kind == i).nonzero()[:, 0] for i in range(len(kinds))]


def _rounded(n: Tensor) -> Tensor:
    step = torch.exp2((n.double().log2().floor() - 2).clamp(min=3)).long()
    return (n + step - 1) // step * step


def _bucket(some: Segments, place_of_key: Tensor | None, repeat: int, dtype: torch.dtype, device: torch.device) -> Bucket:
    q, k = torch.arange(int(some.length.max())), torch.arange(int(some.keys.max()))
    before = (some.context + some.before)[:, None]
    keys = torch.where(k < some.context[:, None], some.context_start[:, None] + k, some.own_start[:, None] + k - some.context[:, None])
    real = k < some.keys[:, None]
    queries = some.begin[:, None] + q
    seen = (k <= (before[..., None] + q[:, None])) & real[:, None]          # causal, aligned to the end
    bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))[:, None].repeat(1, 1, repeat, 1)
    last = int((some.begin + some.length).max()) - 1                        # padded rows read a real row; nothing of it is used
    rows = queries.clamp(max=last).flatten(), _in_order(torch.where(real, keys, some.own_start[:, None]).flatten(), place_of_key)
    return Bucket(len(some.begin), rows[0].to(device), rows[1].to(device), bias.to(device))


def _key_rows(segments: Segments) -> Tensor:
    size = segments.keys
    segment = torch.arange(len(size)).repeat_interleave(size)
    k = torch.arange(int(size.sum())) - (size.cumsum(0) - size)[segment]
    context = segments.context[segment]
    return torch.where(k < context, segments.context_start[segment] + k, segments.own_start[segment] + k - context)


def _in_order(rows: Tensor, place_of_key: Tensor | None) -> Tensor:
    """Rows of the packed row as rows of the keys at hand: the same, or where the gather over ranks has put them."""
    return rows if place_of_key is None else place_of_key[rows]


def _cumulative(lengths: Tensor, device: torch.device) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0)).to(device=device, dtype=torch.int32)


def attend(query: Tensor, key: Tensor, value: Tensor, plan: RowPlan) -> Tensor:
    """query [S, A, D], key and value [S, K, D] (A a multiple of K) -> [S, A * D]."""
    if plan.flash:
        assert plan.key_rows is not None
        return _FLASH[plan.flash](query, key[plan.key_rows], value[plan.key_rows], plan).flatten(1)
    outputs = [_padded(query, key, value, bucket) for bucket in plan.buckets]
    return (torch.cat(outputs) if len(outputs) > 1 else outputs[0]).index_select(0, plan.place)


def _varlen(query: Tensor, k: Tensor, v: Tensor, plan: RowPlan) -> Tensor:
    """torch's. Older torch (2.11) knows no `enable_gqa`: keys are repeated there for each query head, which is exact."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = query.shape[1] != k.shape[1]
    options: dict[str, Any] = {}
    if "enable_gqa" in _parameters(varlen_attn):
        options["enable_gqa"] = grouped
    elif grouped:
        k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (k, v))
    return varlen_attn(query, k, v, plan.cu_seqlens_q, plan.cu_seqlens_kv, plan.max_seqlen_q, plan.max_seqlen_kv,  # type: ignore[return-value]
                       window_size=(-1, 0), **options)


def _flash_attn(query: Tensor, k: Tensor, v: Tensor, plan: RowPlan) -> Tensor:
    """The package's: grouped queries as they are; causal is aligned to the end of the keys (since 2.1)."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(query, k, v, plan.cu_seqlens_q, plan.cu_seqlens_kv, plan.max_seqlen_q, plan.max_seqlen_kv, causal=True)


_FLASH: dict[str, Callable[[Tensor, Tensor, Tensor, RowPlan], Tensor]] = {"varlen": _varlen, "flash_attn": _flash_attn}


def refuse_missing_flash_attn(device: torch.device) -> None:
    """UserError where `policy.attention: flash_attn` could not be had."""
    if device.type != "cuda":
        raise UserError(f"policy.attention = flash_attn is for a GPU, and the device is {device.type}; use varlen")
    try:
        package = importlib.import_module("flash_attn")
        _, version = package.flash_attn_varlen_func, package.__version__   # a package of that name may lack either
    except (ImportError, AttributeError) as error:
        raise UserError(f"policy.attention = flash_attn, but it cannot be imported ({error}): pip install flash-attn, or use varlen") from None
    if Version(version) < Version("2.1"):
        raise UserError(f"policy.attention = flash_attn: {version} aligns causal masks to the first key, which 2.1 and later do not; upgrade it, or use varlen")


@functools.cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _padded(query: Tensor, key: Tensor, value: Tensor, bucket: Bucket) -> Tensor:
    """One SDPA for a bucket; the query heads that share a key head are stacked as further queries, so keys are never repeated."""
    n, heads, groups, width = bucket.size, query.shape[1], key.shape[1], query.shape[2]
    q = query.flatten(1).index_select(0, bucket.queries).view(n, -1, groups, heads // groups, width)
    k, v = (x.flatten(1).index_select(0, bucket.keys).view(n, -1, groups, width).transpose(1, 2) for x in (key, value))
    rows = q.shape[1]
    stacked = q.permute(0, 2, 3, 1, 4).reshape(n, groups, -1, width)
    out = F.scaled_dot_product_attention(stacked, k, v, attn_mask=bucket.bias)
    return out.view(n, groups, heads // groups, rows, width).permute(0, 3, 1, 2, 4).reshape(n * rows, heads * width)


class GroupAttention(MegatronModule):
    """megatron's `core_attention`: query [S, 1, A, D], key and value [S, 1, K, D] -> [S, 1, A * D]."""

    def __init__(self, config: TransformerConfig, *args: object, **kwargs: object) -> None:
        super().__init__(config=config)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *,
                packed_seq_params: RowPlan, **_: object) -> Tensor:
        if (part := packed_seq_params.slice) is not None:
            key, value = part.gather(torch.cat([key, value], -1)).chunk(2, -1)
        return attend(query[:, 0], key[:, 0], value[:, 0], packed_seq_params)[:, None]

    def sharded_state_dict(self, *args: object, **kwargs: object) -> dict:
        """Nothing to save."""
        return {}
