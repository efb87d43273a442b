"""`reward average OUT MODEL...`: the mean weights of several fine-tunings of one model (WARM): one judge, one server, less noise.

Tensor by tensor, so that memory holds one output file at a time. Sums are fp64 for fp32 weights and fp32 for 16-bit ones; one model
alone comes out bit for bit. Averaging makes sense for runs that began from the same weights, which the files cannot tell.
"""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sophiavl_fast import model_folder
from sophiavl_fast.errors import UserError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
INDEX = "model.safetensors.index.json"


def average(out: Path, models: Sequence[Path]) -> dict[str, Any]:
    """Write the mean of `models` to the folder `out`, everything but weights taken from the first.

    Returns {models, tensors, bytes}. Raises UserError: `out` is in use, a folder without safetensors, other architectures, names, shapes or dtypes.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"'{out}' exists and is not an empty folder")
    if any(out.resolve() == model.resolve() for model in models):
        raise UserError(f"'{out}' is one of the models")
    files = [_files(model) for model in models]
    for model, found in zip(models[1:], files[1:], strict=True):
        _same_kind(models[0], model)
        _same_names(models[0], files[0], model, found)
    partial = out.with_name(f".{out.name}.partial.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        count, size = _write(partial, models, files)
        for item in models[0].iterdir():
            if item.is_file() and item.suffix not in _WEIGHTS:
                shutil.copy2(item, partial / item.name)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {"models": len(models), "tensors": count, "bytes": size, "out": str(out)}


def _files(model: Path) -> dict[str, str]:
    """Tensor name -> file that holds it."""
    from safetensors import SafetensorError, safe_open

    model_folder.refuse_missing(model, "")
    if (model / INDEX).is_file():
        found = dict(json.loads((model / INDEX).read_text())["weight_map"])
    else:
        found = {}
        try:
            for file in sorted(model.glob("*.safetensors")):
                with safe_open(file, framework="pt") as opened:
                    found |= dict.fromkeys(opened.keys(), file.name)
        except SafetensorError as error:
            raise UserError(f"'{file}' is no safetensors file: {error}") from None
    if not found:
        raise UserError(f"'{model}' holds no safetensors weights")
    for file in sorted(set(found.values())):
        if not (model / file).is_file():
            raise UserError(f"'{model}': '{file}' of its index is missing")
    return found


def _same_kind(first: Path, other: Path) -> None:
    kinds = [json.loads((model / "config.json").read_text()).get("model_type") for model in (first, other)]
    if kinds[0] != kinds[1]:
        raise UserError(f"'{other}' is a {kinds[1]} model, '{first}' a {kinds[0]} model: only runs of one model can be averaged")


def _same_names(first: Path, expected: dict[str, str], other: Path, found: dict[str, str]) -> None:
    for name in sorted(expected.keys() ^ found.keys()):
        holder, lacking = (first, other) if name in expected else (other, first)
        raise UserError(f"'{lacking}' has no tensor '{name}', which '{holder}' has: only runs of one model can be averaged")


def _write(out: Path, models: Sequence[Path], files: Sequence[dict[str, str]]) -> tuple[int, int]:
    """The output's weight files, laid out as the first model's; returns tensors and bytes."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    count = size = 0
    with ExitStack() as stack:
        opened = [{file: stack.enter_context(safe_open(model / file, framework="pt")) for file in set(found.values())}
                  for model, found in zip(models, files, strict=True)]
        for file in sorted(set(files[0].values())):
            tensors = {name: _mean([handles[found[name]].get_tensor(name) for handles, found in zip(opened, files, strict=True)], name, models)
                       for name in sorted(n for n, f in files[0].items() if f == file)}
            save_file(tensors, out / file, metadata=opened[0][file].metadata() or {"format": "pt"})
            count, size = count + len(tensors), size + sum(t.numel() * t.element_size() for t in tensors.values())
    if (models[0] / INDEX).is_file():
        shutil.copy2(models[0] / INDEX, out / INDEX)
    return count, size


def _mean(tensors: list[Any], name: str, models: Sequence[Path]) -> Any:
    """The mean in the tensors' own dtype. Raises UserError for other shapes or dtypes, and for integers that differ."""
    import torch

    first = tensors[0]
    for model, tensor in zip(models[1:], tensors[1:], strict=True):
        if tensor.shape != first.shape or tensor.dtype != first.dtype:
            raise UserError(f"tensor '{name}' is {list(tensor.shape)} {tensor.dtype} in '{model}', {list(first.shape)} {first.dtype} in '{models[0]}'")
        if not first.is_floating_point() and not torch.equal(tensor, first):
            raise UserError(f"tensor '{name}' holds integers that differ between '{models[0]}' and '{model}': they cannot be averaged")
    if len(tensors) == 1 or not first.is_floating_point():
        return first.contiguous()
    total = torch.zeros(first.shape, dtype=torch.float64 if first.dtype in (torch.float32, torch.float64) else torch.float32)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(first.dtype).contiguous()
