"""The metadata of a torch_dist checkpoint, read without running anything that it names.

torch keeps it as a pickle, which may name any function and have it called. Here it may name nothing but the record types that torch's own writer puts
there, the tensors' files must be plain names beside it, and every tensor's bytes must lie within its file.
"""
from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO, Any

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


class _Records(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in RECORDS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


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
        if wrong := [name for name, what in found.state_dict_metadata.items() if not isinstance(what, TensorStorageMetadata)]:
            return f"'{wrong[0]}' is no tensor"
        ends: dict[str, int] = {}
        for place in found.storage_data.values():
            if place.relative_path != Path(place.relative_path).name or place.transform_descriptors:
                return f"'{place.relative_path}' is no file of its own folder"
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        kept = {index.fqn for index in found.storage_data}
        if lost := sorted(set(found.state_dict_metadata) - kept):
            return f"tensor '{lost[0]}' lies in no file"
    except (AttributeError, TypeError) as error:
        return f"it is not of the form that torch writes ({error})"
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            return f"'{name}' is not there"
        if path.stat().st_size < end:
            return f"'{name}' is cut short ({path.stat().st_size} bytes of {end})"
    return None
