"""`checkpoint.format: torch_dist`: every rank writes its own part, through megatron-core's distributed checkpointing.

    __R_0.distcp   written by rank R      .metadata, metadata.json, common.pt   torch's and megatron's records of them

Nothing is gathered: each rank writes the stretches of weights, main weights and moments that its share of the distributed optimizer covers, as boxes of
tensors under published names (pieces.py), the same names as in the other format. A rank of another layout reads the boxes that overlap with its own.
"""
from __future__ import annotations

import inspect
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy, TorchDistSaveShardedStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import StorageMeta

from sophiavl_fast.errors import UserError
from sophiavl_fast.policy import mapping
from sophiavl_fast.policy import optimizer as adam
from sophiavl_fast.policy.checkpoint import vetted
from sophiavl_fast.policy.checkpoint.folder import another
from sophiavl_fast.policy.pieces import Box, boxes
from sophiavl_fast.policy.policy import Policy

BACKEND = CheckpointingConfig("torch_dist", 1)
RANDOM = "rng/cpu"
# megatron-core 0.19 plans for another package's writer unless told
BUILT_IN = ("mcore",) if "async_strategy" in inspect.signature(TorchDistSaveShardedStrategy.async_save).parameters else ()


class _Planned(TorchDistSaveShardedStrategy):
    """megatron's plan of a save, for us to carry out: its own way forks writers out of a process full of threads (0.16), and hands results over by a
    manager process, which outlives a trainer that is killed."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)
        self.writer: Any = None
        self.metadata: Any = None

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, *_: Any) -> AsyncRequest:
        self.writer, self.metadata = writer, save_state_dict_ret[1]
        return AsyncRequest(None, (), [])


class Writing:
    """This rank's part of a checkpoint, in host memory: the format's writer wants it there, `copied` or not."""

    def __init__(self, policy: Policy, folder: Path, *, copied: bool) -> None:
        self._folder = folder
        held = {str(i): _sharded(box, box.data.to("cpu", copy=True)) for i, box in enumerate(_written(policy))}
        strategy = _Planned()
        with mock.patch.object(filesystem_async, "_results_queue", queue.SimpleQueue()):
            strategy.async_save(held, str(folder), *BUILT_IN)
        self._writer, self._metadata = strategy.writer, strategy.metadata

    def write(self) -> tuple[list[Any], set[str]]:
        """Write this rank's file, flushed to disk; returns where in it each box lies, and its name. Raises what keeps it from being written."""
        found: list[Any] = []
        for i, bucket in enumerate(self._writer.write_buckets):
            done: queue.SimpleQueue[Any] = queue.SimpleQueue()
            under_way: queue.Queue[int] = queue.Queue()
            under_way.put(i)
            FileSystemWriterAsync.write_preloaded_data([self._writer.transforms], local_proc_idx=i, write_bucket=bucket, results_queue=done,
                                                       count_queue=under_way, use_fsync=True)
            _, outcome = done.get()
            if isinstance(outcome, Exception):
                raise outcome
            found += outcome
        return found, {result.storage_data.relative_path for result in found}

    def finish(self, parts: list[list[Any]]) -> tuple[dict[str, str], set[str]]:
        """On the first rank: the records that make a checkpoint of the parts. The index of its tensors is theirs, the manifest has none."""
        self._writer.finish(self._metadata, parts)
        torch.save({}, self._folder / "common.pt")   # megatron's own `load` looks for it
        save_config(BACKEND, str(self._folder))
        return {}, {vetted.FILE, "common.pt", "metadata.json"}


class Reader:
    """A torch_dist checkpoint, its metadata vetted. Raises UserError for a part that is missing or cut short, at once."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self._folder, self._metadata = folder, vetted.read(folder)

    def load(self, policy: Policy, *, optimizer: bool) -> None:
        """Put the weights, and the optimizer's state and the random state where asked, into the policy, in place."""
        state = torch.get_rng_state()
        wanted = list(_of_weights(policy))
        if optimizer:
            wanted += [*_of_optimizer(policy), Box(RANDOM, tuple(state.shape), (0,), state)]
        self._refuse_misfit(wanted)

        def read_metadata(reader: FileSystemReader, *_: Any, **__: Any) -> Any:   # torch's would unpickle anything
            self._metadata.storage_meta = StorageMeta(load_id=reader.load_id)
            return self._metadata

        with mock.patch.object(FileSystemReader, "read_metadata", read_metadata):
            try:
                TorchDistLoadShardedStrategy().load({str(i): _sharded(box, box.data) for i, box in enumerate(wanted)}, str(self._folder))
            except (CheckpointException, Exception) as error:   # the former is no Exception
                reason = " ".join(_root(error).split())[:200]
                raise UserError(f"checkpoint '{self._folder}' cannot be read ({reason}); {another(self._folder)}") from error
        if optimizer:
            torch.set_rng_state(state)

    def _refuse_misfit(self, wanted: list[Box]) -> None:
        """UserError before anything is read: megatron's own error is of one rank, and a traceback."""
        kept: dict[str, Any] = self._metadata.state_dict_metadata
        for box in wanted:
            if box.name not in kept:
                raise UserError(f"checkpoint '{self._folder}' holds no tensor '{box.name}'; {another(self._folder)}")
            shape, dtype = tuple(kept[box.name].size), kept[box.name].properties.dtype
            if (shape, dtype) != (box.whole, box.data.dtype):
                raise UserError(f"checkpoint '{self._folder}': tensor '{box.name}' is {list(shape)} {dtype}, expected {list(box.whole)} {box.data.dtype}")


def _root(error: BaseException) -> str:
    """What a failure came from: torch's own is every rank's traceback in one text."""
    if isinstance(error, CheckpointException) and error.failures:
        error = min(error.failures.items())[1][0]
    while inner := error.__cause__ or error.__context__:
        error = inner
    return f"{type(error).__name__}: {error}"


def _sharded(box: Box, data: Tensor) -> ShardedTensor:
    return ShardedTensor(box.name, data, data.dtype, tuple(data.shape), box.whole, box.offset, axis_fragmentations=None)


def _written(policy: Policy) -> Iterator[Box]:
    """Every value of the policy and its optimizer on exactly one rank."""
    state = torch.get_rng_state()
    if dist.get_rank() == 0:
        yield Box(RANDOM, tuple(state.shape), (0,), state)
    for rule, names, parameter in _parameters(policy):
        if _is_copy(policy, rule) or (rule.kind == "whole" and dist.get_rank(policy.layout.tp_group) > 0):
            continue
        if not parameter.requires_grad:
            if dist.get_rank(policy.layout.shards) == 0:
                yield from _cut(policy, "model", rule, names, parameter, parameter.detach().view(-1), 0)
        elif (shard := adam.shard_of(policy.optimizer, parameter)) is not None:
            yield from _cut(policy, "model", rule, names, parameter, parameter.detach().view(-1)[shard.begin:shard.end], shard.begin)
            for key in adam.state_keys(parameter.dtype):
                yield from _cut(policy, key, rule, names, parameter, shard.held(key).view(-1), shard.begin)


def _of_weights(policy: Policy) -> Iterator[Box]:
    for rule, names, parameter in _parameters(policy):
        yield from _cut(policy, "model", rule, names, parameter, parameter.detach().view(-1), 0)


def _of_optimizer(policy: Policy) -> Iterator[Box]:
    for rule, names, parameter in _parameters(policy):
        if parameter.requires_grad and (shard := adam.shard_of(policy.optimizer, parameter)) is not None:
            for key in adam.state_keys(parameter.dtype):
                yield from _cut(policy, key, rule, names, parameter, shard.held(key).view(-1), shard.begin)


def _parameters(policy: Policy) -> Iterator[tuple[mapping.Rule, tuple[str, ...], nn.Parameter]]:
    """(rule, published names, parameter) of what this rank holds; a head tied to the embedding of another stage is a copy of it."""
    for _, rule, parameter in mapping.parameters(policy.model, policy.family):
        yield rule, (policy.family.embedding_name,) if _is_copy(policy, rule) else rule.names, parameter


def _is_copy(policy: Policy, rule: mapping.Rule) -> bool:
    return policy.family.tied and rule.names == (policy.family.head_name,)


def _cut(policy: Policy, key: str, rule: mapping.Rule, names: tuple[str, ...], parameter: nn.Parameter, flat: Tensor, begin: int) -> Iterator[Box]:
    rank = dist.get_rank(policy.layout.tp_group)
    keyed = tuple(f"{key}/{name}" for name in names)
    return boxes(rule, keyed, tuple(parameter.shape), flat, begin, policy.heads, policy.layout.tensor, rank)
