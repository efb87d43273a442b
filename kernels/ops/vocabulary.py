"""A rank's part of the vocabulary, and the per-token statistics that make the parts whole.

A token's log-prob needs four floats of each shard: the largest logit m, and over the shard's logits OTHER than the
target's, relative to m, sum exp(l - m) and sum exp(l - m) (l - m); and the target's logit x (-inf elsewhere). With the
target left out of the sums, log p = -log1p(sum) where the target is the largest: a confident token's tiny log-prob keeps
all its digits, where x - logsumexp would cancel them.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .checks import expect

IGNORE = -100
# exp() of this is 0 in fp32 and fp64; a product with it stays finite, where 0 * -inf would be NaN.
FLOOR = -1000.0


def wide(dtype: torch.dtype) -> torch.dtype:
    """What logits and statistics are computed in: fp32, fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows [offset, offset + valid) of the vocabulary; rows beyond `valid` on this rank are padding."""

    offset: int
    valid: int
    vocab_size: int
    group: ProcessGroup | None

    @classmethod
    def of(cls, name: str, rows: int, vocab_size: int | None, group: ProcessGroup | None, *, agree: bool) -> Shard:
        """This rank's shard of `rows` rows, equal on all ranks. Raises ValueError where the shards do not cover `vocab_size`.

        agree: ask the other ranks for their rows, and refuse unequal shards of the argument `name` on all of them.
        """
        if not torch.compiler.is_compiling():
            expect(group is None or isinstance(group, ProcessGroup), "group", repr(group), "a ProcessGroup, or None")
        ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        if agree and ranks > 1:
            found = torch.full((ranks,), rows, dtype=torch.int64, device=_device(group))
            dist.all_gather(list(found.split(1)), found[:1].clone(), group=group)
            expect(len(found.unique()) == 1, name, f"shards of {found.tolist()} rows", "as many on every rank: pad the last and give the true vocab_size")
        size = rows * ranks if vocab_size is None else vocab_size
        if not isinstance(size, int) or isinstance(size, bool):   # repr only where it is needed: torch.compile's symbols have none
            expect(False, "vocab_size", repr(size), "an int, or None")
        expect(0 < size <= rows * ranks, "vocab_size", size, f"1 to {rows * ranks}, the rows of {ranks} shard(s) of {rows}")
        return cls(rank * rows, min(max(size - rank * rows, 0), rows), size, group)

    def locate(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """(column of each target on this rank, 0 where it is elsewhere; whether it is here)."""
        column = target.long() - self.offset
        here = (column >= 0) & (column < self.valid)
        return column.where(here, 0), here


def _device(group: ProcessGroup | None) -> torch.device:
    """Where the group's collectives take their tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")


def shard_statistics(logits: Tensor, column: Tensor, here: Tensor, entropy: bool) -> Tensor:
    """[4, T]: (max, sum-exp of the others, their sum exp * shifted logit, target logit). Overwrites `logits` [T, valid]."""
    out = logits.new_zeros(4, logits.shape[0])
    if not logits.shape[1]:
        out[0], out[3] = torch.finfo(logits.dtype).min, -torch.inf
        return out
    top = logits.amax(1).clamp_(min=torch.finfo(logits.dtype).min)
    at = column[:, None]
    picked = logits.gather(1, at)
    out[0], out[3] = top, picked[:, 0].where(here, -torch.inf)
    shifted = logits.scatter_(1, at, picked.masked_fill(here[:, None], -torch.inf)).sub_(top[:, None])
    if entropy:
        exp = shifted.exp()
        out[2] = shifted.clamp_(min=FLOOR).mul_(exp).sum(1)
    else:
        exp = shifted.exp_()
    out[1] = exp.sum(1)
    return out


@dataclass(frozen=True, slots=True)
class Whole:
    """Statistics over the whole vocabulary, [T] each: log p(target), entropy, largest logit, sum exp(l - top)."""

    logprob: Tensor
    entropy: Tensor
    top: Tensor
    total: Tensor


def combine(statistics: Tensor, group: ProcessGroup | None) -> Whole:
    """Make [4, T] of every rank whole, by one all-gather."""
    parts = statistics[None]
    if group is not None:
        parts = statistics.new_empty(dist.get_world_size(group), *statistics.shape)
        dist.all_gather(list(parts.unbind(0)), statistics, group=group)
    return merge(parts)


def merge(parts: Tensor) -> Whole:
    """Statistics [shards, 4, T] -> the whole vocabulary's."""
    tops, sums, weighted, picked = parts.unbind(1)
    top = tops.amax(0)
    gap = (tops - top).clamp_(min=FLOOR)
    scale = gap.exp()
    others = (scale * sums).sum(0)
    shifted = picked.amax(0) - top
    own = shifted.exp()
    total = others + own
    log_total = torch.where(shifted == 0, others.log1p(), total.log())
    mean = ((scale * (weighted + gap * sums)).sum(0) + own * shifted.clamp(min=FLOOR)) / total
    return Whole(shifted - log_total, log_total - mean, top, total)
