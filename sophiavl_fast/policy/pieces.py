"""Which part of which published tensor a stretch of a local parameter is: boxes in global coordinates, with no communication.

The distributed optimizer keeps a parameter as flat stretches, one a replica; a tensor rank's parameter is itself cut out of published tensors. Both are
row-major, so that any stretch falls into boxes that are contiguous in memory: each is a view, to be written from or read into.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor

from sophiavl_fast.policy.mapping import Heads, Rule


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [begin, end) of a local parameter: the part of the published tensor `name`, of shape `whole`, that starts at `offset`."""

    name: str
    begin: int
    end: int
    whole: tuple[int, ...]
    offset: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """`data`, a view of its own shape, is the part of the published tensor `name`, of shape `whole`, that starts at `offset`."""

    name: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    data: Tensor


def boxes(rule: Rule, names: tuple[str, ...], shape: tuple[int, ...], flat: Tensor, begin: int, heads: Heads, size: int, rank: int) -> Iterator[Box]:
    """The boxes of `flat`, which holds the values from `begin` on of a parameter of this (local) shape, row-major.

    names: the published names for the rule's kind, in its order; size, rank: tensor-parallel. Rows that pad the vocabulary are in no box.
    """
    width = prod(shape[1:])
    for piece in pieces(rule.kind, names, shape, heads, size, rank):
        first, last = max(begin, piece.begin * width), min(begin + len(flat), piece.end * width)
        start = piece.begin * width
        for offset, sizes in split((piece.end - piece.begin, *shape[1:]), first - start, last - start):
            at = start - begin + sum(o * prod(shape[axis + 1:]) for axis, o in enumerate(offset))
            data = flat[at:at + prod(sizes)].view(sizes)
            yield Box(piece.name, piece.whole, tuple(a + b for a, b in zip(piece.offset, offset, strict=True)), data)


def pieces(kind: str, names: tuple[str, ...], shape: tuple[int, ...], heads: Heads, size: int, rank: int) -> Iterator[Piece]:
    """How a tensor rank's parameter is put together of rows of published tensors; the inverse of mapping.unshard, one rank at a time."""
    rows, rest = shape[0], shape[1:]
    none = (0,) * len(rest)
    if kind == "whole":
        yield Piece(names[0], 0, rows, shape, (0, *none))
    elif kind == "row":
        yield Piece(names[0], 0, rows, (rows, rest[0] * size, *rest[1:]), (0, rank * rest[0], *none[1:]))
    elif kind == "vocab":
        first = rank * rows
        yield Piece(names[0], 0, max(0, min(rows, heads.vocab - first)), (heads.vocab, *rest), (first, *none))
    elif kind == "gated":
        half = rows // 2
        for i, name in enumerate(names):
            yield Piece(name, i * half, (i + 1) * half, (half * size, *rest), (rank * half, *none))
    else:
        tall = (heads.query // heads.key * heads.width, heads.width, heads.width)   # rows of query, key and value beside one key head
        at = 0
        for head in range(rank * heads.key // size, (rank + 1) * heads.key // size):
            for name, height in zip(names, tall, strict=True):
                yield Piece(name, at, at + height, (heads.key * height, *rest), (head * height, *none))
                at += height


def split(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, sizes) of the fewest boxes that make up the values [begin, end) of a row-major tensor, in their order; none where end <= begin."""
    if end <= begin:
        return
    if len(shape) == 1:
        yield (begin,), (end - begin,)
        return
    inner = prod(shape[1:])
    while begin < end:
        row, within = divmod(begin, inner)
        if within == 0 and (rows := (end - begin) // inner):
            yield (row,) + (0,) * (len(shape) - 1), (rows, *shape[1:])
            begin += rows * inner
            continue
        stop = min(end, (row + 1) * inner)
        for offset, sizes in split(shape[1:], within, within + stop - begin):
            yield (row, *offset), (1, *sizes)
        begin = stop
