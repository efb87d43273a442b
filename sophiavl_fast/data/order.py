"""Which record comes at which position of a run: a pure function of (seed, sizes, weights, position).

Without weights the sets are joined: every epoch is one permutation of all records. With weights each position first
draws its set, then takes that set's next record, each set going through its own permutations. Nothing but the position
has to be kept to resume.
"""
from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from sophiavl_fast.types import derive_seed

_BLOCK = 4096  # draws made, and counts kept, together


class Order:
    """Positions 0, 1, ... -> (set, row). `sizes` are the sets' lengths; `weights` their relative shares, None to join them."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, *, seed: int, shuffle: bool) -> None:
        self._starts = [0, *accumulate(sizes)]
        self._sizes, self._seed, self._shuffle = list(sizes), seed, shuffle
        self._shares = None if weights is None else np.asarray(weights, dtype=np.float64) / sum(weights)
        self._counts = [np.zeros(len(sizes), dtype=np.int64)]  # draws of each set before each block
        self._draws: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}   # stream -> its current epoch and permutation

    @property
    def total(self) -> int:
        return self._starts[-1]

    def at(self, position: int) -> tuple[int, int]:
        """(set, row) of a position."""
        if self._shares is None:
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
            self._draws = block, generator.choice(len(self._sizes), size=_BLOCK, p=self._shares)
        return self._draws[1]

    def _permuted(self, stream: int, epoch: int, size: int, place: int) -> int:
        if not self._shuffle:
            return place
        if self._epochs.get(stream, (-1,))[0] != epoch:
            self._epochs[stream] = epoch, np.random.default_rng(derive_seed(self._seed, "order", stream, epoch)).permutation(size)
        return int(self._epochs[stream][1][place])
