"""Hugging Face tensors <-> megatron parameters, one at a time: never a second copy of the model.

Under tensor parallelism a megatron parameter is a shard; under pipeline parallelism it lives on one stage. Loading
cuts each tensor to this rank's part; `full_tensors` gathers over tensor ranks, broadcasts over stages and yields
(published name, full tensor) on every rank, in the same order.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sophiavl_fast import model_folder
from sophiavl_fast.errors import UserError

if TYPE_CHECKING:
    from sophiavl_fast.policy.distributed import Layout

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Rule:
    """How one megatron parameter is made of published tensors.

    whole: the same on every rank; row: split along inputs; vocab: split along the padded vocabulary;
    qkv: query, key and value interleaved by key head; gated: gate and up projections, each split.
    """

    kind: Literal["whole", "row", "vocab", "qkv", "gated"]
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Heads:
    """Sizes that shape the fused qkv parameter, and the vocabulary."""

    query: int
    key: int
    width: int
    vocab: int
    padded_vocab: int


class Folder:
    """Published tensors of a model folder, read one at a time from its safetensors files."""

    def __init__(self, path: Path, published: Callable[[str], str]) -> None:
        self.path, self.files = path, {published(name): (name, file) for name, file in model_folder.tensor_files(path).items()}
        self._open: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __call__(self, name: str) -> Tensor:
        if name not in self.files:
            raise UserError(f"model.path = '{self.path}': tensor '{name}' is missing from its safetensors files")
        stored, file = self.files[name]
        where = f"model.path = '{self.path}'"
        if file not in self._open:
            self._open[file] = open_file(self.path / file, where, model_folder.AGAIN)
        tensor = read_tensor(self._open[file], stored, f"{where}: {file}", model_folder.AGAIN)
        if tensor.dtype not in FLOATS:
            raise UserError(f"{where}: tensor '{stored}' is {str(tensor.dtype).removeprefix('torch.')} in {file}; weights must be "
                            "float32, bfloat16 or float16: dequantise them first")
        return tensor


def open_file(path: Path, where: str, hint: str) -> Any:
    """A safetensors file, its header checked against its length. Raises UserError `where: fault; hint` for one that is missing, cut short or no such file."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt")
    except FileNotFoundError:
        raise UserError(f"{where}: '{path.name}' is not there; {hint}") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where}: '{path.name}' is cut short or no safetensors file ({error}); {hint}") from None


def read_tensor(file: Any, name: str, where: str, hint: str) -> Tensor:
    """A tensor of an open file. Raises UserError `where: fault; hint`."""
    from safetensors import SafetensorError

    try:
        return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where}: tensor '{name}' cannot be read ({error}); {hint}") from None


def parameters(model: Any, family: Any) -> Iterator[tuple[str, Rule, nn.Parameter]]:
    """(local name, rule, parameter) of everything this rank holds; a head tied to a local embedding is not repeated."""
    layers = model.language.decoder.layers
    first_layer = layers[0].layer_number - 1 if len(layers) else 0
    for name, parameter in model.named_parameters():
        yield name, family.rule(name, first_layer), parameter


def load(model: nn.Module, family: Any, heads: Heads, layout: Layout) -> None:
    """Fill every parameter from the family's model folder. Raises UserError for a missing or misshapen tensor."""
    fill(model, family, heads, layout, Folder(family.folder, family.published), lambda p, part: p.data.copy_(part), f"model.path = '{family.folder}'")


@torch.no_grad()
def fill(model: nn.Module, family: Any, heads: Heads, layout: Layout, read: Callable[[str], Tensor],
         put: Callable[[nn.Parameter, Tensor], Any], where: str, select: Callable[[nn.Parameter], bool] = lambda p: True) -> None:
    """Read published tensors with `read`, cut them to this rank's part and `put` it for every selected parameter. Raises UserError naming `where`."""
    rank = dist.get_rank(layout.tp_group)
    for name, rule, parameter in parameters(model, family):
        if not select(parameter):
            continue
        names = (family.embedding_name,) if family.tied and rule.names == (family.head_name,) else rule.names
        tensors = [read(n) for n in names]
        try:
            part = shard(rule.kind, tensors, heads, layout.tensor, rank)
        except (RuntimeError, IndexError) as error:  # no whole number of heads, or parts that do not fit together
            shapes = ", ".join(str(list(t.shape)) for t in tensors)
            raise UserError(f"{where}: {', '.join(names)} have the shapes {shapes}, which make no {name} of {list(parameter.shape)} "
                            f"({' '.join(str(error).split())[:200]}): weights and config.json are of different models") from None
        if part.shape != parameter.shape:
            raise UserError(f"{where}: {', '.join(names)} gives {list(part.shape)} for {name}, expected {list(parameter.shape)}")
        put(parameter, part)


def shard(kind: str, tensors: list[Tensor], heads: Heads, size: int, rank: int) -> Tensor:
    """Published tensors -> this tensor rank's part."""
    if kind == "whole":
        return tensors[0]
    if kind == "row":
        return tensors[0].chunk(size, 1)[rank]
    if kind == "vocab":
        return F.pad(tensors[0], (0, 0, 0, heads.padded_vocab - heads.vocab)).chunk(size, 0)[rank]
    if kind == "gated":
        return torch.cat([t.chunk(size, 0)[rank] for t in tensors])
    by_key = [t.view(heads.key, -1, *t.shape[1:]) for t in tensors]
    return torch.cat(by_key, 1).flatten(0, 1).chunk(size, 0)[rank]


def unshard(kind: str, parts: list[Tensor], heads: Heads) -> list[Tensor]:
    """All tensor ranks' parts -> published tensors; the inverse of `shard`."""
    if kind == "whole":
        return [parts[0]]
    if kind == "row":
        return [torch.cat(parts, 1)]
    if kind == "vocab":
        return [torch.cat(parts)[: heads.vocab]]
    if kind == "gated":
        halves = [p.chunk(2) for p in parts]
        return [torch.cat([h[i] for h in halves]) for i in range(2)]
    fused = torch.cat(parts)
    fused = fused.view(heads.key, -1, *fused.shape[1:])
    queries = heads.query // heads.key * heads.width
    return [t.flatten(0, 1) for t in fused.split([queries, heads.width, heads.width], 1)]


@torch.no_grad()
def full_tensors(model: nn.Module, family: Any, heads: Heads, layout: Layout, value: Callable[[nn.Parameter], Tensor] = lambda p: p.detach(),
                 *, dtype: torch.dtype | None = None, select: Callable[[nn.Parameter], bool] = lambda p: True) -> Iterator[tuple[str, Tensor]]:
    """(published name, full tensor on the device), every rank iterating together.

    `value` gives what to read of a selected parameter, in its shape and in `dtype` (None: the parameter's own).
    """
    local = {rule.names: (rule, p) for _, rule, p in parameters(model, family) if select(p) and not (family.tied and rule.names == (family.head_name,))}
    entries = [(dist.get_rank(layout.pp_group), rule, p.shape, dtype or p.dtype) for rule, p in local.values()]
    if layout.pipeline > 1:
        stages: list[Any] = [None] * layout.pipeline
        dist.all_gather_object(stages, entries, group=layout.pp_group)
        entries = [entry for stage in stages for entry in stage]
    for stage, rule, shape, kind in entries:
        mine = stage == dist.get_rank(layout.pp_group)
        part = value(local[rule.names][1]).contiguous() if mine else torch.empty(shape, dtype=kind, device=layout.device)
        if layout.pipeline > 1:
            dist.broadcast(part, dist.get_global_rank(layout.pp_group, stage), group=layout.pp_group)
        parts = [part]
        if layout.tensor > 1 and rule.kind != "whole":
            parts = [torch.empty_like(part) for _ in range(layout.tensor)]
            dist.all_gather(parts, part, group=layout.tp_group)
        yield from zip(rule.names, unshard(rule.kind, parts, heads), strict=True)
