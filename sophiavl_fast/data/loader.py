"""The training stream: one global cursor over mixed datasets, prepared ahead by threads.

A position's prompt depends on (seed, position) alone: neither threads, replicas nor restarts change it. A record that
cannot be used (data.on_error: skip) is replaced at its own position, so that the cursor moves by the same count everywhere.
"""
from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from sophiavl_fast.config import Config
from sophiavl_fast.data.check import check_before_training
from sophiavl_fast.data.dataset import BadRecord, Dataset
from sophiavl_fast.data.limits import Limits
from sophiavl_fast.data.order import Order, at
from sophiavl_fast.data.processor import Processor
from sophiavl_fast.errors import UserError
from sophiavl_fast.types import Prompt

Weights = list[float | list[list[float]]]
_ATTEMPTS = 100  # unusable records in a row, at one position, before the stream gives up


class Loader:
    """`next(count)` is the stream. `skipped` counts unusable records that this replica met (data.on_error: skip)."""

    def __init__(self, datasets: list[Dataset], weights: Weights | None, processor: Processor, config: Config, seed: int) -> None:
        self._datasets, self._weights, self._seed = datasets, weights, seed
        self._processor, self._data = processor, config.data
        self._per_step = _prompts_per_step(config)
        self._order = Order([len(d) for d in datasets], weights, seed=seed, shuffle=config.data.shuffle, per_step=self._per_step)  # type: ignore[arg-type]
        self._pool = ThreadPoolExecutor(config.data.workers, thread_name_prefix="data")
        self._ahead: dict[int, Future[tuple[Prompt, int]]] = {}
        self._cursor = self.skipped = 0

    @classmethod
    def open(cls, config: Config, processor: Processor, *, names: str | Mapping[str, float | Mapping[int, float]] | None = None,
             seed: int | None = None, limits: Limits = Limits()) -> Loader:
        """Open and mix `names` (data.train): a comma-separated list joins sets, name -> weight (or its curriculum) draws from them.

        limits: what the recipe asks of every record beside data.max_prompt_tokens. The first rank checks the records by data.check.
        Raises UserError; BadRecord for a record that data.on_error refuses.
        """
        chosen, weights = parse_mix(config.data.train if names is None else names)
        datasets = [Dataset.open(n, config.data.registry, template=config.data.templates, limits=limits) for n in chosen]
        if os.environ.get("RANK", "0") == "0":
            check_before_training(datasets, processor, config.data)
        return cls(datasets, weights, processor, config, config.run.seed if seed is None else seed)

    @property
    def epoch(self) -> float:
        """Records given out so far over the records there are."""
        return self._cursor / self._order.total

    def next(self, count: int, *, replica: int = 0, replicas: int = 1) -> list[Prompt]:
        """This replica's share, count / replicas prompts, of the next `count` of the stream; every replica's cursor moves by `count`.

        Raises BadRecord where a record cannot be used and data.on_error is refuse.
        """
        if count % replicas:
            raise UserError(f"{count} prompts do not divide over {replicas} replicas")
        share = count // replicas
        ahead = self._cursor + count + replica * share
        return self._given(range(self._cursor + replica * share, self._cursor + (replica + 1) * share), range(ahead, ahead + share), count)

    def fresh(self, counts: Sequence[int], *, replica: int = 0) -> list[Prompt]:
        """counts[replica] further prompts of the stream; every replica's cursor moves by sum(counts)."""
        first = self._cursor + sum(counts[:replica])
        return self._given(range(first, first + counts[replica]), range(0), sum(counts))

    def _given(self, wanted: range, soon: range, count: int) -> list[Prompt]:
        """The prompts of `wanted` positions, those of `soon` begun; the cursor moves by `count`."""
        for position in [*wanted, *soon]:
            if position not in self._ahead:
                self._ahead[position] = self._pool.submit(self._prepare, position, *self._order.at(position))
        prompts = []
        for position in wanted:
            prompt, skipped = self._ahead.pop(position).result()
            prompts.append(prompt)
            self.skipped += skipped
        self._cursor += count
        for position in [p for p in self._ahead if p < self._cursor]:  # prepared for a share that changed
            self._ahead.pop(position).cancel()
        return prompts

    def state(self) -> dict[str, Any]:
        """What resuming needs, JSON values only: the cursor, and what the stream was made of."""
        return {"cursor": self._cursor, "skipped": self.skipped, **self._identity()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, with any number of replicas. Raises UserError where data, weights, seed or order are not the same."""
        for key, value in self._identity().items():
            _refuse_other(key, state.get(key), value)
        self._cursor, self.skipped = state["cursor"], state["skipped"]

    def close(self) -> None:
        """Stop the threads and close the files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
        for dataset in self._datasets:
            dataset.close()

    def _identity(self) -> dict[str, Any]:
        found = {"seed": self._seed, "datasets": [[d.name, len(d)] for d in self._datasets]}
        return found | _settings(self._data.shuffle, self._weights, self._per_step)

    def _prepare(self, position: int, index: int, row: int) -> tuple[Prompt, int]:
        """The prompt of a position and how many unusable records stood in its way. Runs in a thread."""
        for attempt in range(_ATTEMPTS):
            try:
                return self._datasets[index].prompt(row, self._processor, self._data.max_prompt_tokens), attempt
            except BadRecord as error:
                if self._data.on_error == "refuse":
                    raise
                last = error
            row = self._order.spare(position, index, attempt)
        raise BadRecord(f"{last} (the last of {_ATTEMPTS} unusable records in a row)")


def refuse_other_stream(config: Config, state: Mapping[str, Any]) -> None:
    """UserError where the loader's `state` in a checkpoint is of other data than the configuration's. It tells no set's length."""
    names, weights = parse_mix(config.data.train)
    if "datasets" in state:
        _refuse_other("datasets", [name for name, _ in state["datasets"]], names)
    for key, value in _settings(config.data.shuffle, weights, _prompts_per_step(config)).items():
        if key in state:
            _refuse_other(key, state[key], value)


def _refuse_other(key: str, kept: Any, mine: Any) -> None:
    if kept != mine:
        raise UserError(f"the checkpoint's data stream had {key} = {kept}, this run has {mine}; restore it or start a new run.dir")


def _prompts_per_step(config: Config) -> int:
    return config.rollout.prompts_per_step if config.recipe == "rl" else config.sft.batch_size


def _settings(shuffle: bool, weights: Weights | None, per_step: int) -> dict[str, Any]:
    """What a configuration says of its stream."""
    changing = any(isinstance(w, list) for w in weights or ())
    return {"shuffle": shuffle, "weights": weights} | ({"prompts_per_step": per_step} if changing else {})   # the steps of a curriculum are counted in it


def parse_mix(names: str | Mapping[str, float | Mapping[int, float]]) -> tuple[list[str], Weights | None]:
    """Dataset names and their weights, curricula as [[step, weight], ...]; None joins the sets by size.

    Raises UserError for an empty or repeated name, a weight <= 0, or a curriculum that is empty, negative or leaves nothing to draw.
    """
    chosen = [n.strip() for n in (names.split(",") if isinstance(names, str) else names)]
    if not all(chosen) or len(set(chosen)) < len(chosen):
        raise UserError(f"data.train = {names!r}: expected different dataset names")
    if isinstance(names, str):
        return chosen, None
    weights = [_weight(name, weight) for name, weight in names.items()]
    steps = np.array(sorted({step for w in weights if isinstance(w, list) for step, _ in w} or {0}))
    total = np.sum([at(w, steps) for w in weights], axis=0)  # type: ignore[arg-type]
    if not (total > 0).all():  # linear in between, so that the points decide
        raise UserError(f"data.train: at step {steps[total <= 0][0]:g} every dataset has weight 0: nothing could be drawn")
    return chosen, weights


def _weight(name: str, weight: float | Mapping[int, float]) -> float | list[list[float]]:
    if not isinstance(weight, Mapping):
        if not weight > 0:
            raise UserError(f"data.train: weight of '{name}' is {weight}; must be greater than 0")
        return float(weight)
    points = [[int(step), float(value)] for step, value in sorted(weight.items())]
    if not points:
        raise UserError(f"data.train: the curriculum of '{name}' is empty; expected {{step: weight, ...}}")
    for step, value in points:
        if step < 0 or not 0 <= value < float("inf"):
            raise UserError(f"data.train: the curriculum of '{name}' has weight {value:g} at step {step}; both must be at least 0")
    return points


def open_eval(config: Config, processor: Processor, *, limits: Limits = Limits()) -> list[Prompt]:
    """The prompts of data.eval, in the file's order; eval.limit takes that many evenly spaced ones, so that sorted files keep all types.

    Raises UserError; BadRecord unless data.on_error is skip, which leaves such records out, with a warning of how many, and refuses a set without another.
    """
    dataset = Dataset.open(config.data.eval, config.data.registry, template=config.data.templates, limits=limits)
    count = min(len(dataset), config.eval.limit or len(dataset))
    bad: list[str] = []

    def prepare(index: int) -> Prompt | None:
        try:
            return dataset.prompt(index, processor, config.data.max_prompt_tokens)
        except BadRecord as error:
            if config.data.on_error == "refuse":
                raise
            bad.append(str(error))
            return None

    try:
        with ThreadPoolExecutor(config.data.workers, thread_name_prefix="data") as pool:
            found = list(pool.map(prepare, [i * len(dataset) // count for i in range(count)]))
    finally:
        dataset.close()
    if len(bad) == count:
        raise BadRecord(f"{min(bad)} (data.eval = {config.data.eval}: none of the {count} records asked for can be used)")
    if bad and os.environ.get("RANK", "0") == "0":
        logging.getLogger(__name__).warning("%s: %d of %d held-out records cannot be used and are left out; one of them: %s",
                                            config.data.eval, len(bad), count, min(bad))
    return [p for p in found if p is not None]
