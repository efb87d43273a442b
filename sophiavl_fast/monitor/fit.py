"""Whether a configuration fits this machine: its model, data, layout and memory."""
from __future__ import annotations

import json
import math
import os
from pathlib import Path

import psutil

import sophiavl_fast
from sophiavl_fast import config as tree
from sophiavl_fast.config import Config
from sophiavl_fast.errors import UserError, nearest
from sophiavl_fast.monitor.checks import GIB, Row

PACKAGED_REGISTRY = Path(sophiavl_fast.__file__).parent / "data" / "dataset_info.json"


def rows(config: Config, gpus: list[dict]) -> list[Row]:
    """One row each for the model, every dataset, the layout and the memory of a rank."""
    world = int(os.environ.get("WORLD_SIZE", 0)) or max(1, len(gpus) if config.device != "cpu" else 1)
    parameters = count_parameters(Path(config.model.path))
    out = [_model(config, parameters), *_datasets(config), _layout(config, world)]
    if parameters and out[-1].status == "OK":
        out.append(_memory(config, parameters, world, gpus if config.device != "cpu" else []))
    return out


def count_parameters(folder: Path) -> int:
    """Parameters in the folder's safetensors files, read from their headers alone; 0 where there are none."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as raw:
            header = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def rank_bytes(config: Config, parameters: int, world: int) -> dict[str, float]:
    """Bytes that the policy holds on one rank: weights, fp32 gradients, AdamW state (its share of the replicas), reference.

    Parameters are taken as spread evenly over tensor and pipeline ranks. Activations are not counted.
    """
    half = config.model.dtype == "bfloat16"
    model_parallel = config.parallel.tensor * config.parallel.pipeline
    mine, replicas = parameters / model_parallel, world // model_parallel
    weights = mine * (2 if half else 4)
    moments = mine * (12 if half else 8) / replicas  # two fp32 moments, with bf16 weights an fp32 copy too
    reference = weights if config.recipe == "rl" and config.algorithm.kl_coef > 0 and not config.policy.offload_reference else 0.0
    return {"weights": weights, "gradients": 4 * mine, "optimizer": moments, "reference": reference}


def _model(config: Config, parameters: int) -> Row:
    folder = Path(config.model.path)
    if not folder.is_dir():
        return Row("model", "FAIL", f"'{folder}' does not exist", "model.path names a Hugging Face folder on disk")
    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError) as error:
        return Row("model", "FAIL", f"'{folder}/config.json' cannot be used: {error}", "download the whole Hugging Face folder")
    if not parameters:
        return Row("model", "FAIL", f"'{folder}' holds no safetensors weights", "download the whole Hugging Face folder")
    return Row("model", "OK", f"{kind}, {parameters / 1e9:.3g} B parameters" if parameters >= 1e8 else f"{kind}, {parameters / 1e6:.3g} M parameters")


def _datasets(config: Config) -> list[Row]:
    files = [PACKAGED_REGISTRY, *([Path(config.data.registry)] if config.data.registry else [])]
    known: dict[str, tuple[dict, Path]] = {}
    for file in files:
        try:
            known |= {name: (entry, file) for name, entry in json.loads(file.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError) as error:
            return [Row("data", "FAIL", f"registry '{file}' cannot be read: {error}", "data.registry names a JSON file in the form of dataset_info.json")]
    train = config.data.train.split(",") if isinstance(config.data.train, str) else list(config.data.train)
    names = [name.strip() for name in train] + ([config.data.eval] if config.data.eval else [])
    return [_dataset(name, known) for name in dict.fromkeys(names) if name]


def _dataset(name: str, known: dict[str, tuple[dict, Path]]) -> Row:
    base = name.partition("@")[0]
    if base not in known:
        return Row(f"data {name}", "FAIL", f"not in the registry{nearest(base, known)}", "see data.registry")
    entry, registry = known[base]
    folder = Path(os.environ.get("SOPHIAVL_DATA", "data")) if registry == PACKAGED_REGISTRY else registry.parent
    path = folder / str(entry.get("file_path", ""))
    if not path.exists():
        return Row(f"data {name}", "FAIL", f"'{path}' does not exist", f"named by registry '{registry}'; relative paths start at '{folder}'")
    return Row(f"data {name}", "OK", str(path))


def _layout(config: Config, world: int) -> Row:
    p = config.parallel
    try:
        tree.check(config, world)
    except UserError as error:
        return Row("layout", "FAIL", str(error), f"counted {world} processes; torchrun sets WORLD_SIZE")
    return Row("layout", "OK", f"{world} processes = tensor {p.tensor} × pipeline {p.pipeline} × data {world // (p.tensor * p.pipeline)}")


def _memory(config: Config, parameters: int, world: int, gpus: list[dict]) -> Row:
    parts = rank_bytes(config, parameters, world)
    need = sum(parts.values()) / GIB
    if gpus:
        engine = config.recipe == "rl" and not config.rollout.urls
        have = min(g["gib"] for g in gpus) * (1 - config.rollout.gpu_memory_utilization * engine)
        where = "of a GPU beside the rollout engine" if engine else "of a GPU"
    else:
        have, where = psutil.virtual_memory().available / GIB / world, "of host memory a rank"
    text = f"{need:.2f} GiB a rank ({', '.join(f'{k} {v / GIB:.2f}' for k, v in parts.items() if v)}) in {have:.1f} GiB {where}"
    if need > have:
        return Row("policy memory", "FAIL", text, "raise parallel.tensor or the number of GPUs, or set policy.offload_reference=true")
    if need > 0.75 * have:
        return Row("policy memory", "WARN", text, "little is left for activations: lower policy.tokens_per_row or set policy.recompute=true")
    return Row("policy memory", "OK", text)
