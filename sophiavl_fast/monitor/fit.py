"""Whether a configuration fits this machine: its model, data, layout and memory, as rows of the doctor's table."""
from __future__ import annotations

import json
import math
import os
from pathlib import Path

import sophiavl_fast
from sophiavl_fast import config as tree
from sophiavl_fast import config_checks, model_folder
from sophiavl_fast.config import Config
from sophiavl_fast.errors import UserError, nearest
from sophiavl_fast.monitor import budget, shapes
from sophiavl_fast.monitor.checks import Row, Status

PACKAGED_REGISTRY = Path(sophiavl_fast.__file__).parent / "data" / "dataset_info.json"


def rows(config: Config, gpus: list[dict]) -> list[Row]:
    """One row each for the model, every dataset, the layout, the memory of each pipeline stage's ranks, and the engine's."""
    world = config_checks.world_size(os.environ) or _processes(config, gpus)
    out = [_model(config), *_datasets(config)]
    try:
        sizes = shapes.read(config.model.path)
    except UserError:                           # the model's row says so
        return [*out, _layout(config, world, None, gpus)]
    out.append(_layout(config, world, sizes, gpus))
    return out + _memory(config, sizes, world, gpus) if out[-1].status == "OK" else out


def _processes(config: Config, gpus: list[dict]) -> int:
    """One a GPU that engines leave, where the layout can fill them; else as many as it asks for, on other machines too."""
    least, p = config_checks.least_processes(config), config.parallel
    alone = config.device == "cpu" or (config.recipe == "rl" and config.rollout.engine == "inline")
    there = 0 if alone else len(gpus) - len(config.rollout.gpus)
    return least if p.data or there < 1 or there % (p.tensor * p.pipeline * p.context) else there


def count_parameters(folder: Path) -> int:
    """Parameters of the folder's weights, read from their headers alone. Raises UserError for a folder that holds none or a spoilt file."""
    files = sorted(set(model_folder.tensor_files(folder).values()))
    return sum(math.prod(entry["shape"]) for file in files for entry in model_folder.header(folder / file).values())


def _model(config: Config) -> Row:
    folder = Path(config.model.path)
    if not folder.is_dir():
        return Row("model", "FAIL", f"'{folder}' does not exist", "model.path names a Hugging Face folder on disk")
    try:
        model_folder.refuse_quantised(folder)
        shapes.read(folder)                     # a family that is not supported is told before what stands in its files
        model_folder.refuse_unreadable(folder)
        kind, parameters = model_folder.read(folder).get("model_type"), count_parameters(folder)
    except UserError as error:
        return Row("model", "FAIL", *str(error).rsplit("; ", 1))
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


def _layout(config: Config, world: int, sizes: shapes.Sizes | None, gpus: list[dict]) -> Row:
    p = config.parallel
    try:
        tree.check(config, world)
        config_checks.check_placement(config)
        config_checks.check_gpus(config, world, os.environ, cuda=config.device == "cuda" or bool(gpus and config.device != "cpu"))
        if sizes:
            shapes.check_layout(sizes, p)
    except UserError as error:
        return Row("layout", "FAIL", str(error), f"counted {world} processes; torchrun sets WORLD_SIZE")
    share = f" × context {p.context}" if p.context > 1 else ""
    replicas = world // (p.tensor * p.pipeline * p.context)
    return Row("layout", "OK", f"{world} processes = tensor {p.tensor} × pipeline {p.pipeline}{share} × data {replicas}")


def _memory(config: Config, sizes: shapes.Sizes, world: int, gpus: list[dict]) -> list[Row]:
    """A row for each pipeline stage with its predicted peak by item, and one for an engine on the same GPU."""
    device = budget.device_of(config, gpus, world)
    found, have = budget.needs(config, sizes, world, device), config.memory.fraction * device.bytes
    hint = "" if budget.fits(found, config, device) else budget.advice(config, sizes, world, device)
    out = []
    for need in found:
        name = "memory of a rank" if len(found) == 1 else f"memory, stage {need.stage}"
        text = f"{need.text(0)} in {budget.gib(have)} ({config.memory.fraction:g} of its {device.name})"
        over = need.bytes > have
        status: Status = ("FAIL" if config.memory.check == "refuse" else "WARN") if over else "OK"
        out.append(Row(name, status, text, f"{hint}; train obeys memory.check" if over else ""))
    return out + _engine(config, sizes, device)


def _engine(config: Config, sizes: shapes.Sizes, device: budget.Device) -> list[Row]:
    taken = budget.engine(config, sizes, device)
    if not taken or not device.cuda:
        return []
    weights = sizes.total * (2 if config.model.dtype == "bfloat16" else 4) / config.rollout.tensor_parallel
    text = f"weights {budget.gib(weights)} GiB in the {budget.gib(taken)} that it takes; the rest, less its activations, is key-value cache"
    hint = "raise rollout.gpu_memory_utilization or rollout.tensor_parallel"
    return [Row("engine memory", "FAIL" if weights > taken else "OK", text, hint if weights > taken else "")]
