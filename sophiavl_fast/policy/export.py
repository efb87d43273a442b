"""A Hugging Face folder from the live policy: safetensors, config, tokenizer and processor files."""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sophiavl_fast.policy.policy import Policy

SHARD_BYTES = 4 << 30
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".msgpack", ".h5")


def export(policy: Policy, out: Path) -> Path:
    """Write `out` so that AutoModelForImageTextToText.from_pretrained(out) loads it; an older folder there is replaced.

    Every rank iterates the weights, the first one writes them: shards of at most 4 GiB under the published names,
    in the policy's dtype, beside copies of all of model.path's small files; the processor's name the run's pixel limits,
    so that whoever loads the folder sees pictures of the sizes that were trained on. It appears whole or not at all.
    """
    writer = _Writer(out) if torch.distributed.get_rank() == 0 else None
    for name, tensor in policy.weights():
        if writer is not None:
            writer.add(name, tensor)
    if writer is not None:
        _copy_files(policy.family.folder, writer.folder, str(policy.model.config.params_dtype).removeprefix("torch."))
        _limit_pixels(policy.family.folder, writer.folder, policy.config.model.min_pixels, policy.config.model.max_pixels)
        writer.finish()
    policy.layout.wait("export")
    return out


class _Writer:
    """Collects tensors into shards in a temporary folder beside the final one."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out.with_name(f".{out.name}.writing")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.held: dict[str, Tensor] = {}
        self.bytes = self.total = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.held and self.bytes + size > SHARD_BYTES:
            self._flush()
        self.held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self.bytes += size
        self.total += size

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self.held, str(self.folder / f"part-{len(self.shards)}"), metadata={"format": "pt"})
        self.shards.append(list(self.held))
        self.held, self.bytes = {}, 0

    def finish(self) -> None:
        self._flush()
        if len(self.shards) == 1:
            (self.folder / "part-0").rename(self.folder / "model.safetensors")
        else:
            files = [f"model-{i + 1:05d}-of-{len(self.shards):05d}.safetensors" for i in range(len(self.shards))]
            for i, file in enumerate(files):
                (self.folder / f"part-{i}").rename(self.folder / file)
            index = {"metadata": {"total_size": self.total}, "weight_map": {n: f for f, names in zip(files, self.shards) for n in names}}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        if self.out.exists():
            shutil.rmtree(self.out)
        self.folder.rename(self.out)


def _copy_files(source: Path, target: Path, dtype: str) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHTS) and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)
    config = json.loads((target / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _limit_pixels(source: Path, target: Path, low: int | None, high: int | None) -> None:
    """Write the limits where transformers reads them, with the source's own for one that is None; a family that cuts tiles has none and stays as it is."""
    places = [(target / "preprocessor_config.json", ""), (target / "processor_config.json", "image_processor")]  # the latter counts where it names them
    trees = [(file, tree, tree.get(key) if key else tree) for file, key in places if file.is_file() and isinstance(tree := json.loads(file.read_text()), dict)]
    if (low is None and high is None) or not trees:
        return
    from transformers import AutoProcessor

    kept = dict(AutoProcessor.from_pretrained(source, local_files_only=True, trust_remote_code=False).image_processor.size)
    if kept.get("shortest_edge") is None:
        return
    low, high = low or kept["shortest_edge"], high or kept["longest_edge"]
    for file, tree, images in trees:
        if isinstance(images, dict):
            images |= {"size": {"shortest_edge": low, "longest_edge": high}, "min_pixels": low, "max_pixels": high}  # older readers prefer the latter
            file.write_text(json.dumps(tree, indent=2) + "\n")
