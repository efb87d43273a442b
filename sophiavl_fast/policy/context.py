"""Context parallelism: each rank of the group computes a part of every packed row, exactly.

A row of S tokens is cut into 2C chunks; rank r holds chunks r and 2C-1-r, so that early tokens (few keys) and late ones
(many) are shared evenly. Only attention looks across: every layer gathers keys and values over the group, and their
gradients come back summed (with grouped queries keys are a fraction of the row). Images are merged into the row before
it is split; log-probs are taken for each rank's own tokens and put together as one float a token.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from sophiavl_fast.types import Batch


@dataclass(slots=True)
class Slice:
    """This rank's part of one row, on the CPU until `to`."""

    group: ProcessGroup | None
    chunks: list[tuple[int, int]]  # [begin, end) of this rank's chunks in the row, ascending
    rows: Tensor                   # [S/C] rows of the row that this rank holds, ascending
    gathered: Tensor               # [S] where each row of the row lies once the ranks' parts are put after each other
    local: Tensor                  # [S] where it lies in this rank's part, -1 elsewhere
    targets: Tensor                # [T of this rank] targets whose predictor this rank holds

    def to(self, device: torch.device) -> Slice:
        """The same with its tensors there."""
        return Slice(self.group, self.chunks, *(t.to(device) for t in (self.rows, self.gathered, self.local, self.targets)))

    def gather(self, x: Tensor) -> Tensor:
        """[S/C, ...] -> [S, ...] in the order of `gathered`; the gradient is summed over the ranks."""
        return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.group)  # type: ignore[no-any-return]

    def whole(self, mine: Tensor, size: int) -> Tensor:
        """This rank's log-probs (of `targets`) -> those of all T = size targets, on every rank.

        Every rank then computes the whole loss, so its gradient is taken as it stands and not summed.
        """
        return _Whole.apply(mine, self.targets, size, self.group)  # type: ignore[no-any-return]


def cut(batch: Batch, rank: int, size: int, group: ProcessGroup | None) -> Slice:
    """What rank `rank` of `size` holds of a row, whose length is a multiple of 2 size."""
    total = len(batch.tokens)
    width = total // (2 * size)
    assert width * 2 * size == total, f"a row of {total} tokens over {size} ranks"
    every = [torch.cat([torch.arange(begin, end) for begin, end in _chunks(r, size, width)]) for r in range(size)]
    rows = every[rank]
    gathered, local = torch.empty(total, dtype=torch.int64), torch.full((total,), -1)
    gathered[torch.cat(every)] = torch.arange(total)
    local[rows] = torch.arange(len(rows))
    return Slice(group, _chunks(rank, size, width), rows, gathered, local, (local[batch.predictor] >= 0).nonzero()[:, 0])


def _chunks(rank: int, size: int, width: int) -> list[tuple[int, int]]:
    return [(i * width, (i + 1) * width) for i in (rank, 2 * size - 1 - rank)]


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, targets: Tensor, size: int, group: ProcessGroup | None) -> Tensor:
        ctx.save_for_backward(targets)
        out = mine.new_zeros(size)
        out[targets] = mine
        dist.all_reduce(out, group=group)  # every target is one rank's: a sum with zeros, exact
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return grad[ctx.saved_tensors[0]], None, None, None
