"""Which record comes at which position of a run: a pure function of (seed, sizes, weights, position).

Without weights the sets are joined: every epoch is one permutation of all records. With weights each position first
draws its set, then takes that set's next record, each set going through its own permutations. Weights may change along the
stream (a curriculum): they too follow from the position. Nothing but the position has to be kept to resume.
"""
from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from sophiavl_fast.types import derive_seed

_BLOCK = 4096  # draws made, and counts kept, together
Points = Sequence[tuple[float, float]]  # (step, weight), ascending


def at(weight: float | Points, steps: np.ndarray) -> np.ndarray:
    """A weight [N] at steps [N]."""
    if not isinstance(weight, Sequence):
        return np.full(len(steps), float(weight))
    where, values = zip(*weight, strict=True)
    return np.interp(steps, where, values)


class Order:
    """Positions 0, 1, ... -> (set, row). `sizes` are the sets' lengths; `weights` their relative shares, None to join them.

    A weight given as points is interpolated linearly between them and constant outside, at step = position // per_step.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float | Points] | None, *, seed: int, shuffle: bool, per_step: int = 1) -> None:
        self._starts = [0, *accumulate(sizes)]
        self._sizes, self._seed, self._shuffle = list(sizes), seed, shuffle
        self._weights, self._per_step = weights, per_step
        self._counts = [np.zeros(len(sizes), dtype=np.int64)]  # draws of each set before each block
        self._draws: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}   # stream -> its current epoch and permutation

    @property
    def total(self) -> int:
        return self._starts[-1]

    def at(self, position: int) -> tuple[int, int]:
        """(set, row) of a position."""
        if self._weights is None:
            epoch, place = divmod(position, self.total)
            row = self._permuted(-1, epoch, self.total, place)
            index = bisect_right(self._starts, row) - 1
            return index, row - self._starts[index]
        block, place = divmod(position, _BLOCK)
        while len(self._counts) <= block:
            self._counts.append(self._counts[-1] + np.bincount(self._block(len(self._counts) - 1), minlength=len(self._sizes)))
        draws = self._block(block)
        index = int(draws[place])
        epoch, place = divmod(int(self._counts[block][index] + (draws[:place] == index).sum()), self._sizes[index])
        return index, self._permuted(index, epoch, self._sizes[index], place)

    def spare(self, position: int, index: int, attempt: int) -> int:
        """The row of set `index` that stands in for an unusable one: drawn from the position alone, so that no other position moves."""
        return derive_seed(self._seed, "spare", position, attempt) % self._sizes[index]

    def _block(self, block: int) -> np.ndarray:
        if self._draws[0] != block:
            generator = np.random.default_rng(derive_seed(self._seed, "mix", block))
            self._draws = block, self._drawn(generator, block)
        return self._draws[1]

    def _drawn(self, generator: np.random.Generator, block: int) -> np.ndarray:
        """The sets [_BLOCK] of a block's positions."""
        weights = self._weights or ()
        if not any(isinstance(w, Sequence) for w in weights):
            constant = np.asarray(weights, dtype=np.float64)
            return generator.choice(len(self._sizes), size=_BLOCK, p=constant / constant.sum())
        steps = (block * _BLOCK + np.arange(_BLOCK)) // self._per_step
        bounds = np.stack([at(w, steps) for w in weights], 1).cumsum(1)
        # a set is drawn where its share of [0, 1) holds the number: one of weight 0 has none
        return (generator.random(_BLOCK)[:, None] >= bounds / bounds[:, -1:]).sum(1)

    def _permuted(self, stream: int, epoch: int, size: int, place: int) -> int:
        if not self._shuffle:
            return place
        if self._epochs.get(stream, (-1,))[0] != epoch:
            self._epochs[stream] = epoch, np.random.default_rng(derive_seed(self._seed, "order", stream, epoch)).permutation(size)
        return int(self._epochs[stream][1][place])
