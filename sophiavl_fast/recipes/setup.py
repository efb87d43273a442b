"""What recipes share around their loops: where to resume, how many updates, what a checkpoint's state holds."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from sophiavl_fast import config as tree
from sophiavl_fast import model_folder, types
from sophiavl_fast.config import Config
from sophiavl_fast.data.loader import Loader, refuse_other_stream
from sophiavl_fast.errors import UserError
from sophiavl_fast.policy import checkpoint
from sophiavl_fast.policy.families import open_family
from sophiavl_fast.rewards.thinking import load_template
from sophiavl_fast.rollout import saved

STATE = ("step", "total_steps", "seed", "loader", "config")


def is_first_rank() -> bool:
    """Whether this process speaks for the run, known before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def write_config(run_dir: Path, config: Config) -> None:
    """Keep the resolved tree beside the run's metrics."""
    if is_first_rank():
        (run_dir / "config.yaml").write_text(tree.dump(config))


def resume_point(config: Config) -> Path | None:
    """The checkpoint to go on from, or None for a new run. Raises UserError where run.resume cannot be honoured, or the checkpoint is spoilt, of
    another model, of another seed or of other data: all of it before any weight is loaded."""
    run_dir, wish = Path(config.run.dir), config.run.resume
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir = '{run_dir}' cannot be made: {error.strerror}") from None
    if not os.access(run_dir, os.W_OK):
        raise UserError(f"run.dir = '{run_dir}': nothing can be written there")
    if wish == "never":
        if (run_dir / "metrics.jsonl").exists() or checkpoint.newest(run_dir):
            raise UserError(f"run.dir '{run_dir}' holds a run already; use run.resume=auto to go on or another run.dir")
        return None
    if wish != "auto" and not Path(wish).is_dir():
        raise UserError(f"run.resume = '{wish}' is neither auto, never nor a checkpoint folder")
    found = checkpoint.newest(run_dir) if wish == "auto" else Path(wish)
    if found:
        checkpoint.refuse_unusable(found, config)
        kept = read_state(found)
        if (seed := kept["seed"]) != config.run.seed:
            raise UserError(f"run.seed = {config.run.seed}, but checkpoint '{found}' was made with {seed}; set run.seed={seed} or another run.dir")
        refuse_other_stream(config, kept["loader"])
    return found


def read_state(found: Path) -> dict[str, Any]:
    """What `state` put into a checkpoint. Raises UserError for a folder that is none, or none of a recipe."""
    kept = checkpoint.read_state(found)
    if lacking := [key for key in STATE if key not in kept]:
        raise UserError(f"checkpoint '{found}' was not written by `train`: its state lacks {', '.join(lacking)}")
    return kept


def steps_left(config: Config, found: Path | None) -> int:
    """Steps that a run from this checkpoint (None: from the start) still makes."""
    return max(0, config.run.steps - (int(read_state(found)["step"]) if found else 0))


def refuse_unreadable(config: Config, found: Path | None = None) -> None:
    """UserError for a model, a judge or a folder of recorded rollouts that cannot be used, before anything is loaded.

    found: the checkpoint that the run goes on from.
    """
    open_family(config.model.path)
    model_folder.refuse_unreadable(config.model.path)
    if config.recipe == "rl":
        refuse_missing_judge(config)
        saved.refuse_unusable(config, int(read_state(found)["step"]) if found else None)


def refuse_missing_judge(config: Config) -> None:
    """UserError for a judge's folder or template that is not there or cannot be read, before anything is loaded."""
    if config.thinking.backend == "off" or config.algorithm.name == "grpo":
        return
    if config.thinking.backend == "local":
        model_folder.refuse_unreadable(config.thinking.path, "thinking.path")
    load_template(config)


def updates(config: Config) -> int:
    """Optimizer updates of the whole run: what the learning-rate schedule spans."""
    return config.run.steps * (config.algorithm.mini_batches * config.algorithm.epochs if config.recipe == "rl" else 1)


def state(config: Config, step: int, loader: dict[str, Any], skipped: int | None = None) -> dict[str, Any]:
    """What a checkpoint keeps beside the policy: JSON values only. `config` lets `export` rebuild the policy.

    loader: the loader's state after this step was drawn; skipped: unusable records met by all replicas, where there are several.
    """
    kept = loader if skipped is None else loader | {"skipped": skipped}
    return {"step": step, "total_steps": config.run.steps, "seed": config.run.seed, "loader": kept, "config": config.model_dump()}


def restore_stream(loader: Loader, found: Path | None) -> None:
    """Have the loader go on where the checkpoint was written. Raises UserError where data have grown since: before any weight is loaded."""
    if found:
        loader.load_state(read_state(found)["loader"])


def restore(config: Config, policy: Any, loader: Any, found: Path | None) -> int | None:
    """Load a checkpoint into the policy, and what `restore_stream` could not know into the loader; returns its step, None for a new run.

    T of the annealing stays what the run began with, so that a resumed run anneals as the uninterrupted one.
    """
    if found is None:
        return None
    kept = checkpoint.load(policy, found)
    if policy.replica:
        loader.skipped = 0  # the checkpoint's count is of all replicas: the first goes on with it
    if config.trust.anneal_steps is None:
        config.trust.anneal_steps = float(kept["config"]["trust"]["anneal_steps"] or kept["total_steps"])
    return int(kept["step"])


def checkpoint_due(config: Config, step: int) -> bool:
    """At every checkpoint.every steps, and at the end."""
    return step == config.run.steps or (bool(config.checkpoint.every) and step % config.checkpoint.every == 0)


def split(groups: list[types.Group], advantages: torch.Tensor | None, parts: int) -> list[tuple[list[types.Group], torch.Tensor | None]]:
    """Cut a rollout batch into `parts` shares of whole groups with their advantages [B]; empty ones where there are no groups.

    Every `parts`-th group, since a replica holds a run of the step's prompts: each share is then of the same prompts in any layout.
    """
    if len(groups) % parts:
        raise UserError(f"{len(groups)} groups of a replica do not divide into algorithm.mini_batches = {parts}")
    if advantages is None:
        return [([], None)] * parts
    rows = advantages.split([len(g.responses) for g in groups])
    return [(groups[first::parts], torch.cat(rows[first::parts])) for first in range(parts)]
