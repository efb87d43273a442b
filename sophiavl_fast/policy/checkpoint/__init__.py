"""Checkpoints that any layout can load, that no crash can spoil, and that run no code when read.

Two formats (`checkpoint.format`), the same tensors under the same published names in both: `safetensors` holds whole tensors (whole.py), `torch_dist`
each rank's own part of them, through megatron-core's distributed checkpointing (sharded.py). Any of the two is recognised when it is read.
"""
from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from sophiavl_fast.compat.megatron_cpu import without_cuda
from sophiavl_fast.config import Config
from sophiavl_fast.errors import EngineError, UserError
from sophiavl_fast.policy import optimizer as adam
from sophiavl_fast.policy.checkpoint import folder, sharded, whole
from sophiavl_fast.policy.checkpoint.folder import newest, set_aside
from sophiavl_fast.policy.checkpoint.identity import identity, refuse_another
from sophiavl_fast.policy.families import open_family
from sophiavl_fast.policy.policy import Policy
from sophiavl_fast.policy.together import together

__all__ = ["Draft", "begin", "identity", "load", "newest", "read_state", "refuse_unusable", "save", "set_aside"]
FORMATS: dict[str, Any] = {"safetensors": whole, "torch_dist": sharded}


@dataclass(slots=True)
class Draft:
    """A checkpoint under way, of which every rank holds its part."""

    place: Path
    target: Path
    manifest: dict[str, Any]
    part: whole.Writing | sharded.Writing

    def publish(self, group: ProcessGroup, keep: int) -> Path:
        """Write it, give it its final name, and drop all but the newest `keep` checkpoints; every rank of `group` calls it. Returns the folder.

        Raises on every rank where one of them cannot write: UserError for what the operating system refuses (a full disk), else EngineError.
        """
        try:
            parts = together(self._write, group)
            together(lambda: self._finish(parts, keep) if dist.get_rank() == 0 else None, group)   # nobody goes on before it has its name
        except (UserError, EngineError) as error:
            if dist.get_rank() == 0:
                shutil.rmtree(self.place, ignore_errors=True)
            raise type(error)(f"checkpoint '{self.target}' could not be written ({error}); what was saved before it stands") from error
        return self.target

    def _write(self) -> tuple[Any, dict[str, list[int]]]:
        index, files = self.part.write()
        return index, folder.digests(self.place, files)

    def _finish(self, parts: list[tuple[Any, dict[str, list[int]]]], keep: int) -> None:
        index, files = self.part.finish([index for index, _ in parts])
        for name in files:
            folder.sync(self.place / name)
        written = {name: digest for _, digests in parts for name, digest in digests.items()} | folder.digests(self.place, files)
        folder.write_json(self.place / "manifest.json", self.manifest | {"tensors": index, "files": written})
        folder.publish(self.place, self.target, keep)


def save(policy: Policy, run_dir: str | Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write RUN/checkpoints/step_N and drop all but the newest `keep`; every rank calls it. Returns the folder.

    state holds JSON values only and comes back from `load`. Raises as Draft.publish.
    """
    return begin(policy, run_dir, step, state, copied=False).publish(policy.layout.control, keep)


def begin(policy: Policy, run_dir: str | Path, step: int, state: dict[str, Any], *, copied: bool) -> Draft:
    """An empty folder, and what goes into it; every rank calls it. copied: all in host memory, so that training may go on while it is written."""
    target, place = folder.names(run_dir, step)
    policy.wake()
    together(lambda: folder.empty(place) if dist.get_rank() == 0 else None, policy.layout.control)
    form = policy.config.checkpoint.format
    manifest = {"format": form, "step": step, "updates": policy.updates, "identity": identity(policy.config, policy.family), "state": state}
    with without_cuda(policy.device):
        return Draft(place, target, manifest, FORMATS[form].Writing(policy, place, copied=copied))


def read_state(path: str | Path) -> dict[str, Any]:
    """The recipe's state of a checkpoint, without loading any tensor. Raises UserError where `path` is none."""
    return folder.read_manifest(Path(path))["state"]


def refuse_unusable(path: str | Path, config: Config) -> None:
    """UserError for a checkpoint of another model than model.path's, or with a part missing or cut short: known before any weight is loaded."""
    _open(Path(path), identity(config, open_family(config.model.path)))


def load(policy: Policy, path: str | Path, *, optimizer: bool = True) -> dict[str, Any]:
    """Put a checkpoint into the policy, whatever layout and format it was written in; returns the recipe's state. Every rank calls it.

    optimizer=False takes the weights only. Raises UserError, on every rank, where the checkpoint is of another model or a part of it is missing, cut short
    or damaged, before anything changes.
    """
    path, control = Path(path), policy.layout.control
    manifest, reader = _open(path, identity(policy.config, policy.family))
    rank, ranks, files = dist.get_rank(), dist.get_world_size(), sorted(manifest.get("files", {}).items())
    together(lambda: folder.refuse_damaged(path, dict(files[rank::ranks])), control)   # each file read by one rank
    policy.wake()
    with without_cuda(policy.device):
        together(lambda: reader.load(policy, optimizer=optimizer), control)
        if optimizer:
            adam.set_steps(policy.optimizer, manifest["updates"])
            policy.updates = manifest["updates"]
    return manifest["state"]


def _open(path: Path, here: dict[str, Any]) -> tuple[dict[str, Any], whole.Reader | sharded.Reader]:
    manifest = folder.read_manifest(path)
    refuse_another(path, manifest, here)
    form = manifest.get("format", "safetensors")   # earlier checkpoints do not name theirs
    if not isinstance(form, str) or form not in FORMATS:
        raise UserError(f"checkpoint '{path}' is of the format {form!r}; known: {', '.join(FORMATS)}")
    folder.refuse_incomplete(path, manifest.get("files", {}))
    return manifest, FORMATS[form].Reader(path, manifest)
