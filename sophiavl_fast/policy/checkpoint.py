"""Checkpoints that any layout can load, that no crash can spoil, and that run no code when read.

    RUN/checkpoints/step_N/manifest.json      identity of the model, index of tensors, update count, the recipe's JSON state
                           part-R-K.safetensors  written by rank R

Tensors are whole and carry published names: `model/NAME` in the policy's dtype, `main/NAME` (fp32 main weights, under
bf16), `exp_avg/NAME` and `exp_avg_sq/NAME`. Ranks gather them together, one at a time, and take turns in writing. A
checkpoint is written beside its place, flushed to disk and renamed: what bears the final name is complete.
"""
from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from sophiavl_fast.compat.megatron_cpu import without_cuda
from sophiavl_fast.config import Config
from sophiavl_fast.errors import UserError
from sophiavl_fast.policy import mapping
from sophiavl_fast.policy import optimizer as adam
from sophiavl_fast.policy.families import Family, open_family
from sophiavl_fast.policy.policy import Policy

PART_BYTES = 2 << 30
MANIFEST = {"step": int, "updates": int, "identity": dict, "state": dict, "tensors": dict}
COMPLETE = re.compile(r"step_(\d+)|\.step_(\d+)\.replaced")  # the latter for the instant in which a step is saved anew


def save(policy: Policy, run_dir: str | Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write RUN/checkpoints/step_N and drop all but the newest `keep`; every rank calls it. Returns the folder.

    state holds JSON values only and comes back from `load`.
    """
    draft, target = begin(policy, run_dir, step)
    index = write(shares(policy), draft, dist.get_rank())
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, index, group=policy.layout.control)
    if dist.get_rank() == 0:
        tensors = {name: file for part in everyone for name, file in part.items()}
        write_json(draft / "manifest.json", manifest(policy, step, state) | {"tensors": tensors})
        publish(draft, target, keep)
    policy.layout.wait("checkpoint")
    return target


def begin(policy: Policy, run_dir: str | Path, step: int) -> tuple[Path, Path]:
    """An empty draft folder and the place it is for; every rank calls it."""
    target = Path(run_dir) / "checkpoints" / f"step_{step}"
    draft = target.with_name(f".{target.name}.writing")
    policy.wake()
    if dist.get_rank() == 0:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    policy.layout.wait("checkpoint")
    return draft, target


def manifest(policy: Policy, step: int, state: dict[str, Any]) -> dict[str, Any]:
    """All of the manifest but its index of tensors."""
    return {"step": step, "updates": policy.updates, "identity": identity(policy.config, policy.family), "state": state}


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
        _sync(folder / file)
        index.update(dict.fromkeys(held, file))
        held.clear()

    for name, tensor in tensors:
        held[name] = tensor
        if sum(t.nbytes for t in held.values()) >= PART_BYTES:
            flush()
    if held:
        flush()
    return index


def publish(draft: Path, target: Path, keep: int) -> None:
    """Give a complete draft its name, and drop all but the newest `keep` checkpoints."""
    _publish(draft, target)
    _retain(target.parent, keep)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write and flush to disk."""
    path.write_text(json.dumps(value))
    _sync(path)


def newest(run_dir: str | Path) -> Path | None:
    """The complete checkpoint with the highest step, None where there is none."""
    found = [(step, path) for path in (Path(run_dir) / "checkpoints").glob("*step_*") if (step := _step(path)) is not None]
    return max(found)[1] if found else None


def set_aside(run_dir: str | Path, step: int, found: Path) -> list[Path]:
    """Rename RUN/checkpoints/step_N of every N beyond `step`, and of `step` itself where it is not `found`, to abandoned_step_N, so that none of them is
    taken for the newest; returns their new places.

    For a run that was told to go on from the checkpoint `found`: they are of the course that it left. Nothing is deleted.
    """
    moved, kept = [], found.resolve()
    complete = sorted((at, path) for path in (Path(run_dir) / "checkpoints").glob("*step_*") if (at := _step(path)) is not None)
    for at, path in complete:
        if at < step or (at == step and path.resolve() == kept):
            continue
        places = (path.with_name(f"abandoned_step_{at}{suffix}") for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2))))
        target = next(place for place in places if not place.exists())
        path.rename(target)
        moved.append(target)
    if moved:
        _sync(moved[0].parent)
    return moved


def read_state(path: str | Path) -> dict[str, Any]:
    """The recipe's state of a checkpoint, without loading any tensor. Raises UserError where `path` is none."""
    return _manifest(Path(path))["state"]


def refuse_unusable(path: str | Path, config: Config) -> None:
    """UserError for a checkpoint of another model than model.path's, or with a part missing or cut short: known before any weight is loaded."""
    folder = Path(path)
    found = _manifest(folder)
    _check_identity(folder, found, identity(config, open_family(config.model.path)))
    _Reader(folder, found["tensors"])


def load(policy: Policy, path: str | Path, *, optimizer: bool = True) -> dict[str, Any]:
    """Put a checkpoint into the policy, whatever layout wrote it; returns the recipe's state. Every rank calls it.

    optimizer=False takes the weights only. Raises UserError where the checkpoint is of another model or a part of it is missing or cut short,
    before anything changes.
    """
    folder = Path(path)
    manifest = _manifest(folder)
    _check_identity(folder, manifest, identity(policy.config, policy.family))
    read = _Reader(folder, manifest["tensors"])
    policy.wake()
    with without_cuda(policy.device):
        _fill(policy, read, "model", lambda p, part: p.data.copy_(part), lambda p: True)
        if optimizer:
            _load_optimizer(policy, read, manifest["updates"])
    if optimizer:
        policy.updates = manifest["updates"]
        torch.set_rng_state(read("rng/cpu"))
    policy.layout.wait("checkpoint")
    return manifest["state"]


def _tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"model/{name}", t) for name, t in policy.weights())
    for key in _optimizer_keys(policy):
        def whole(parameter: torch.nn.Parameter, key: str = key) -> Tensor:
            return adam.gathered(policy.optimizer, policy.layout, parameter, lambda shard: _held(shard, key))

        found = mapping.full_tensors(policy.model, policy.family, policy.heads, policy.layout, whole, dtype=torch.float32, select=lambda p: p.requires_grad)
        yield from ((f"{key}/{name}", t) for name, t in found)


def _optimizer_keys(policy: Policy) -> tuple[str, ...]:
    """fp32 weights are their own main weights."""
    return adam.MOMENTS if policy.model.config.params_dtype == torch.float32 else (*adam.MOMENTS, "main")


def _held(shard: adam.Shard, key: str) -> Tensor:
    return shard.main.data if key == "main" else shard.moments[key]


def _load_optimizer(policy: Policy, read: _Reader, updates: int) -> None:
    for key in _optimizer_keys(policy):
        def put(parameter: torch.nn.Parameter, part: Tensor, key: str = key) -> None:
            if (shard := adam.shard_of(policy.optimizer, parameter)) is not None:
                _held(shard, key).view(-1).copy_(part.reshape(-1)[shard.begin:shard.end])

        _fill(policy, read, key, put, lambda p: p.requires_grad)
    adam.set_steps(policy.optimizer, updates)


def _fill(policy: Policy, read: _Reader, key: str, put: Callable[..., Any], select: Callable[..., bool]) -> None:
    mapping.fill(policy.model, policy.family, policy.heads, policy.layout, lambda name: read(f"{key}/{name}"), put, f"checkpoint '{read.folder}'", select)


class _Reader:
    """Tensors of a checkpoint by name, one at a time. Raises UserError for a part that is missing or cut short, at once."""

    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        self.folder, self.files, self.hint = folder, files, _another(folder)
        self.open = {file: mapping.open_file(folder / file, f"checkpoint '{folder}'", self.hint) for file in sorted(set(files.values()))}

    def __call__(self, name: str) -> Tensor:
        if name not in self.files:
            raise UserError(f"checkpoint '{self.folder}' holds no tensor '{name}'")
        file = self.files[name]
        return mapping.read_tensor(self.open[file], name, f"checkpoint '{self.folder}': {file}", self.hint)


def _another(folder: Path) -> str:
    """What to do about a spoilt checkpoint: the newest one beside it that is complete, by its manifest."""
    others = [(step, path) for path in folder.parent.glob("step_*") if path != folder and (step := _step(path)) is not None]
    return f"another one is '{max(others)[1]}'" if others else "no other checkpoint lies beside it"


def identity(config: Config, family: Family) -> dict[str, Any]:
    """What must agree for a checkpoint to fit: family, sizes, dtype, what is trained; `fields`: all else that decides what the model computes."""
    fields = family.transformer()
    sizes = {k: fields[k] for k in ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")}
    return {
        "model_type": family.name, **sizes, "vocab_size": family.vocab_size, "tie_word_embeddings": family.tied,
        "vision_depth": family.vision_depth, "vision_hidden_size": family.vision_hidden_size, "model.dtype": config.model.dtype,
        "model.freeze_vision": config.model.freeze_vision, "fields": family.described,
    }


def _check_identity(folder: Path, manifest: dict[str, Any], here: dict[str, Any]) -> None:
    """Fields are compared where both name them: other versions of transformers know others, and earlier checkpoints have none."""
    stored, own = manifest["identity"], here["fields"]
    there = stored["fields"] if isinstance(stored.get("fields"), dict) else {}
    pairs = [(key, stored.get(key), value) for key, value in here.items() if key != "fields"]
    for key, old, new in pairs + [(key, there[key], value) for key, value in own.items() if key in there]:
        if old != new:
            cure = f"set {key}={str(old).lower()}" if key.startswith("model.") else f"resume with the run's own model.path{_model_path(manifest)}"
            raise UserError(f"checkpoint '{folder}' is of another model: {key} is {old!r} there, {new!r} here; {cure}")


def _model_path(manifest: dict[str, Any]) -> str:
    """` = 'PATH'` of the run that wrote the checkpoint, where its state tells."""
    try:
        return f" = '{manifest['state']['config']['model']['path']}'"
    except (KeyError, TypeError):
        return ""


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        inside = newest(folder)
        raise UserError(f"'{folder}' is not a checkpoint: manifest.json: {error}" + (f"; did you mean '{inside}'?" if inside else "")) from None
    wrong = [key for key, kind in MANIFEST.items() if not isinstance(found, dict) or not isinstance(found.get(key), kind)]
    if wrong or not all(isinstance(file, str) for file in found["tensors"].values()):
        raise UserError(f"'{folder}' is not a checkpoint: manifest.json lacks {', '.join(wrong) or 'the files of its tensors'}; {_another(folder)}")
    return found


def _step(path: Path) -> int | None:
    match = COMPLETE.fullmatch(path.name)
    return int(match[1] or match[2]) if match and (path / "manifest.json").is_file() else None


def _publish(draft: Path, target: Path) -> None:
    _sync(draft)
    replaced = target.with_name(f".{target.name}.replaced")
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    draft.rename(target)
    _sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _retain(folder: Path, keep: int) -> None:
    """Remove old checkpoints; the manifest goes first, so that a half-removed one is never taken for complete."""
    steps = sorted((step, path) for path in folder.glob("step_*") if (step := _step(path)) is not None)
    for _, path in steps[:-keep] if keep > 0 else []:
        (path / "manifest.json").unlink()
        shutil.rmtree(path)


def _sync(path: Path) -> None:
    """Force a file's contents, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
