"""Live dashboards beside metrics.jsonl: TensorBoard by default, Weights & Biases and Trackio when installed."""
from __future__ import annotations

import hashlib
import importlib
import os
from pathlib import Path
from typing import Any, Protocol

from sophiavl_fast.config import Config
from sophiavl_fast.errors import UserError

PROJECT = "sophiavl-fast"


class Logger(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files under `run_dir/tensorboard`; steps that a resumed run repeats are purged."""

    def __init__(self, run_dir: Path, config: Config, resume_step: int | None):
        module = _import("tensorboard")
        first = 0 if resume_step is None else resume_step + 1
        self._writer = module.SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=first, flush_secs=10)

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """One Weights & Biases run a folder. Our own step is the axis, for its history cannot go back when a run is resumed."""

    def __init__(self, run_dir: Path, config: Config, resume_step: int | None):
        module = _import("wandb")
        self._run = module.init(project=PROJECT, name=run_dir.name, id=_run_id(run_dir), resume="allow", dir=str(run_dir), config=config.model_dump())
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """One Trackio run a folder; steps that a resumed run repeats stand there twice, in metrics.jsonl never."""

    def __init__(self, run_dir: Path, config: Config, resume_step: int | None):
        module = _import("trackio")
        self._run = module.init(project=PROJECT, name=f"{run_dir.name}-{_run_id(run_dir)}", resume="allow", config=config.model_dump())

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


KINDS: dict[str, type[TensorBoard] | type[Wandb] | type[Trackio]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def open_loggers(run_dir: Path, config: Config, resume_step: int | None) -> list[Logger]:
    """The loggers that `monitor.*` asks for. Raises UserError for one that is not installed."""
    return [kind(run_dir, config, resume_step) for name, kind in KINDS.items() if getattr(config.monitor, name)]


def refuse_missing_loggers(config: Config) -> None:
    """UserError for a logger that `monitor.*` asks for and that cannot be imported, or for a Weights & Biases that knows nobody to log as."""
    for name in KINDS:
        if getattr(config.monitor, name):
            module = _import(name)
            if name == "wandb" and not _signed_in(module):
                raise UserError("monitor.wandb: true, but wandb has no API key: run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline")


def _signed_in(wandb: Any) -> bool:
    """Whether it can start without asking a person: it would ask, or fail, only after the weights are loaded."""
    needless = os.environ.get("WANDB_MODE", "online") in ("offline", "dryrun", "disabled")
    return bool(needless or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or wandb.api.api_key)


def _import(name: str) -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise UserError(f"monitor.{name}: true, but {name} cannot be imported ({error}): pip install {name}, or set monitor.{name}=false") from None


def _run_id(run_dir: Path) -> str:
    """The same for a run and its resumption."""
    return hashlib.blake2b(str(run_dir.resolve()).encode(), digest_size=6).hexdigest()
