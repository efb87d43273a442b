"""The trainer's stream of weights, cut into buckets; and the names that a checkpoint folder holds."""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from sophiavl_fast.errors import UserError
from sophiavl_fast.types import WeightSource

BUCKET_BYTES = 256 << 20

Bucket = list[tuple[str, Tensor]]


def buckets(source: WeightSource, limit: int = BUCKET_BYTES, *, trained_only: bool = False) -> Iterator[Bucket]:
    """Detached, contiguous tensors in the source's order, grouped up to `limit` bytes (at least one a bucket), so that
    a model larger than memory allows twice still goes through, in one pass over the source.

    trained_only: without those that the source calls `frozen`; such a source has `weights(trained_only=True)`."""
    bucket: Bucket = []
    size = 0
    for name, tensor in source.weights(trained_only=True) if trained_only else source.weights():  # type: ignore[call-arg]
        nbytes = tensor.numel() * tensor.element_size()
        if bucket and size + nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor.detach().contiguous()))
        size += nbytes
    if bucket:
        yield bucket


def description(bucket: Bucket) -> dict[str, list]:
    """names, dtype_names and shapes: what a receiver must know before the bytes come."""
    return {"names": [name for name, _ in bucket], "dtype_names": [str(t.dtype).removeprefix("torch.") for _, t in bucket],
            "shapes": [list(t.shape) for _, t in bucket]}


def checkpoint_names(path: str) -> list[str]:
    """Names of all tensors in a Hugging Face folder's safetensors files; reads headers only."""
    index = Path(path) / "model.safetensors.index.json"
    if index.exists():
        return sorted(json.loads(index.read_text())["weight_map"])
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise UserError(f"model.path '{path}' holds no safetensors files")
    names: list[str] = []
    for file in files:
        with safe_open(str(file), "pt") as opened:
            names += opened.keys()
    return sorted(names)
