"""The metadata of a torch_dist checkpoint, read without running anything that it names.

torch keeps it as a pickle, which may name any function and have it called. Here it may name nothing but the record types that torch's own writer puts
there and change none of them, the tensors' files must be plain names beside it, every tensor must be covered by its boxes, each value once, and every
box's bytes must lie within its file.
"""
from __future__ import annotations

import dataclasses
import itertools
import pickle
from math import prod
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sophiavl_fast.errors import UserError
from sophiavl_fast.policy.checkpoint.folder import another

FILE = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint."
RECORDS = {
    _CHECKPOINT + "metadata": {"Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex", "StorageMeta",
                               "_MEM_FORMAT_ENCODING"},
    _CHECKPOINT + "planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},   # megatron keeps the writers' plans beside them
    _CHECKPOINT + "filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", "float32", "bfloat16", "float16", "uint8"},
    "torch.serialization": {"_get_layout"},   # of a name among torch's layouts
}


class _Records(pickle._Unpickler):   # the one in C does not let its steps be looked at
    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if name in RECORDS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")

    def load_build(self) -> None:
        """Gives an object its fields: a record's, never those of a class, a function or an enumeration's member, which are the whole process's."""
        into = self.stack[-2]
        if isinstance(into, type) or not dataclasses.is_dataclass(into):
            raise pickle.UnpicklingError(f"it would change {into!r}")
        super().load_build()   # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


def read(folder: Path) -> Metadata:
    """The metadata of a torch_dist checkpoint. Raises UserError for what is no such metadata, and for tensors that are not there in full."""
    where, hint = f"checkpoint '{folder}': '{FILE}'", another(folder)
    try:
        with open(folder / FILE, "rb") as file:
            found = _unpickled(file)
    except FileNotFoundError:
        raise UserError(f"{where} is not there; {hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where} cannot be read ({error}); {hint}") from None
    if fault := _fault(found, folder):
        raise UserError(f"{where}: {fault}; {hint}")
    return found


def _unpickled(file: IO[bytes]) -> Any:
    try:
        return _Records(file).load()
    except OSError:
        raise
    except Exception as error:   # whatever bytes that are no pickle make of it
        raise ValueError(" ".join(f"{type(error).__name__}: {error}".split())[:200]) from None


def _fault(found: Any, folder: Path) -> str | None:
    """What keeps this from being the metadata of tensors that all lie in the folder, None for nothing."""
    try:
        return _of_tensors(found) or _of_files(list(found.storage_data.values()), folder)
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        return f"it is not of the form that torch writes ({error})"


def _of_tensors(found: Any) -> str | None:
    boxes: set[tuple[str, tuple[int, ...]]] = set()
    for name, what in found.state_dict_metadata.items():
        if not isinstance(what, TensorStorageMetadata) or not isinstance(what.properties.dtype, torch.dtype):
            return f"'{name}' is no tensor"
        if not _covered(tuple(what.size), [(tuple(c.offsets), tuple(c.sizes)) for c in what.chunks]):
            return f"the parts of tensor '{name}' do not make a whole of {list(what.size)}"
        boxes |= {(name, tuple(chunk.offsets)) for chunk in what.chunks}
    kept = {(index.fqn, tuple(index.offset)) for index in found.storage_data}
    if wrong := sorted(boxes ^ kept):
        name, begin = wrong[0]
        return f"the part of tensor '{name}' at {list(begin)} {'lies in no file' if wrong[0] in boxes else 'is none of its parts'}"
    return None


def _covered(size: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether boxes (offsets, sizes) hold every element of a tensor exactly once."""
    for begin, extent in boxes:
        if not len(begin) == len(extent) == len(size) or not all(type(n) is int and n >= 0 for n in (*begin, *extent)):
            return False
        if any(b + e > s for b, e, s in zip(begin, extent, size, strict=True)):
            return False
    apart = all(any(b + e <= c or c + f <= b for b, e, c, f in zip(*one, *other, strict=True)) for one, other in itertools.combinations(boxes, 2))
    return apart and sum(prod(extent) for _, extent in boxes) == prod(size)


def _of_files(places: list[Any], folder: Path) -> str | None:
    ends: dict[str, int] = {}
    for place in places:
        if place.relative_path != Path(place.relative_path).name or place.transform_descriptors:
            return f"'{place.relative_path}' is no file of its own folder"
        if not all(type(n) is int and n >= 0 for n in (place.offset, place.length)):
            return f"a part of '{place.relative_path}' begins at {place.offset} and is {place.length} bytes long"
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            return f"'{name}' is not there"
        if path.stat().st_size < end:
            return f"'{name}' is cut short ({path.stat().st_size} bytes of {end})"
    return None
