"""Reductions over ragged segments that lie side by side: the responses of a packed row, the groups of a step."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """`index` [N] int64 names each row's segment; `count` segments, empty ones included. No operation syncs with the host."""

    index: Tensor
    count: int

    @classmethod
    def of(cls, boundaries: Tensor, rows: int) -> Segments:
        """From cumulative boundaries [count + 1] that end at `rows`."""
        segments = torch.arange(len(boundaries) - 1, device=boundaries.device)
        return cls(segments.repeat_interleave(boundaries.diff(), output_size=rows), len(boundaries) - 1)

    def sum(self, x: Tensor) -> Tensor:
        """[N] -> [count]; an empty segment gives 0."""
        return x.new_zeros(self.count).index_add(0, self.index, x)

    def mean(self, x: Tensor, where: Tensor) -> Tensor:
        """[N] -> [count], over the rows of `where` [N] bool; 0 where a segment has none."""
        return self.sum(x.where(where, 0)) / self.sum(where.to(x.dtype)).clamp(min=1)

    def extent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N] -> (minimum, maximum) [count]; (inf, -inf) where a segment is empty."""
        low = x.new_full((self.count,), torch.inf).scatter_reduce(0, self.index, x, "amin")
        return low, x.new_full((self.count,), -torch.inf).scatter_reduce(0, self.index, x, "amax")

    def spread(self, x: Tensor) -> Tensor:
        """One value a segment [count] -> one a row [N]; what is [N] already passes through."""
        return x[self.index] if len(x) == self.count else x
