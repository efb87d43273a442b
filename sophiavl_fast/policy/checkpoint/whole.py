"""`checkpoint.format: safetensors`: whole tensors under published names, in files that any reader of safetensors opens.

    part-R-K.safetensors   written by rank R: `model/NAME` in the policy's dtype, `main/NAME` (fp32 main weights, under bf16), `exp_avg/NAME`,
                           `exp_avg_sq/NAME`, `rng/cpu`

Ranks gather tensors together, one at a time, and take turns in writing.
"""
from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from sophiavl_fast.errors import UserError
from sophiavl_fast.policy import mapping
from sophiavl_fast.policy import optimizer as adam
from sophiavl_fast.policy.checkpoint.folder import another, sync
from sophiavl_fast.policy.policy import Policy

PART_BYTES = 2 << 30


class Writing:
    """This rank's share of a checkpoint: all of it in host memory where `copied`, else read from the policy while it is written."""

    def __init__(self, policy: Policy, folder: Path, *, copied: bool) -> None:
        self._folder, self._tensors = folder, list(shares(policy)) if copied else shares(policy)

    def write(self) -> tuple[dict[str, str], set[str]]:
        """Names and files of this rank's tensors, and its files. Collective unless `copied`."""
        index = write(self._tensors, self._folder, dist.get_rank())
        return index, set(index.values())

    def finish(self, parts: list[dict[str, str]]) -> tuple[dict[str, str], set[str]]:
        """The manifest's index, from those that every rank's `write` returned, and the files that it took: none."""
        return {name: file for part in parts for name, file in part.items()}, set()


def shares(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """This rank's tensors of a checkpoint, copied to the CPU; every rank must iterate, and they take turns, tensor by tensor."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        yield "rng/cpu", torch.get_rng_state()
    for i, (name, tensor) in enumerate(_tensors(policy)):
        if i % ranks == rank:
            yield name, tensor.detach().to("cpu", copy=True).contiguous()


def write(tensors: Iterable[tuple[str, Tensor]], folder: Path, rank: int) -> dict[str, str]:
    """Write a rank's tensors in files of about PART_BYTES, flushed to disk; returns their names and files."""
    index: dict[str, str] = {}
    held: dict[str, Tensor] = {}

    def flush() -> None:
        file = f"part-{rank}-{len(set(index.values()))}.safetensors"
        save_file(held, str(folder / file))
        sync(folder / file)
        index.update(dict.fromkeys(held, file))
        held.clear()

    remaining = iter(tensors)
    try:
        for name, tensor in remaining:
            held[name] = tensor
            if sum(t.nbytes for t in held.values()) >= PART_BYTES:
                flush()
        if held:
            flush()
    finally:   # where the disk takes no more: the other ranks still gather what they have to write, and this one's part is in it
        collections.deque(remaining, maxlen=0)
    return index


def _tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"model/{name}", t) for name, t in policy.weights())
    for key in adam.state_keys(policy.model.config.params_dtype):
        def whole(parameter: torch.nn.Parameter, key: str = key) -> Tensor:
            return adam.gathered(policy.optimizer, policy.layout, parameter, lambda shard: shard.held(key))

        found = mapping.full_tensors(policy.model, policy.family, policy.heads, policy.layout, whole, dtype=torch.float32, select=lambda p: p.requires_grad)
        yield from ((f"{key}/{name}", t) for name, t in found)


class Reader:
    """Tensors of a checkpoint by name, one at a time. Raises UserError for a part that is missing or cut short, at once."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.files, self.hint = folder, manifest["tensors"], another(folder)
        self.open = {file: mapping.open_file(folder / file, f"checkpoint '{folder}'", self.hint) for file in sorted(set(self.files.values()))}

    def __call__(self, name: str) -> Tensor:
        if name not in self.files:
            raise UserError(f"checkpoint '{self.folder}' holds no tensor '{name}'; {self.hint}")
        file = self.files[name]
        return mapping.read_tensor(self.open[file], name, f"checkpoint '{self.folder}': {file}", self.hint)

    def load(self, policy: Policy, *, optimizer: bool) -> None:
        """Put the weights, and the optimizer's state and the random state where asked, into the policy."""
        self._fill(policy, "model", lambda p, part: p.data.copy_(part), lambda p: True)
        if not optimizer:
            return
        for key in adam.state_keys(policy.model.config.params_dtype):
            def put(parameter: torch.nn.Parameter, part: Tensor, key: str = key) -> None:
                if (shard := adam.shard_of(policy.optimizer, parameter)) is not None:
                    shard.held(key).view(-1).copy_(part.reshape(-1)[shard.begin:shard.end])

            self._fill(policy, key, put, lambda p: p.requires_grad)
        torch.set_rng_state(self("rng/cpu"))

    def _fill(self, policy: Policy, key: str, put: Callable[..., Any], select: Callable[..., bool]) -> None:
        where = f"checkpoint '{self.folder}'"
        mapping.fill(policy.model, policy.family, policy.heads, policy.layout, lambda name: self(f"{key}/{name}"), put, where, select)
