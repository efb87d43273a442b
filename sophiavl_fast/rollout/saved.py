"""Rollouts kept on disk, and training from them without an engine (`debug.record`, `debug.replay`).

A folder holds one JSON-lines file a step and replica; a line is one prompt's responses. Log-probs are written with all
their digits, so a replayed step is computed from exactly what was sampled, in any layout.
"""
from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from sophiavl_fast import recorded
from sophiavl_fast.config import Config
from sophiavl_fast.errors import UserError
from sophiavl_fast.rollout.engine import OnGroup, OnProgress, RolloutEngine
from sophiavl_fast.types import Group, Prompt, Response, WeightSource


def refuse_unusable(config: Config, done: int | None) -> None:
    """UserError for a folder of debug.record that cannot be made or holds another run's recording, or one of debug.replay that lacks a step of the run.

    done: the step of the checkpoint that the run goes on from; None for a new run. Every rank asks: each node may have folders of its own.
    """
    if config.debug.record:
        make_folder(Path(config.debug.record))
        _refuse_overwriting(Path(config.debug.record), Path(config.run.dir), done or 0)
    if config.debug.replay:
        recorded.refuse_missing(Path(config.debug.replay), range((done or 0) + 1, config.run.steps + 1))


def _refuse_overwriting(folder: Path, run_dir: Path, done: int) -> None:
    """A run would delete what another one recorded of the steps that it begins with. What it recorded itself beyond its checkpoint is its to redo."""
    if (steps := [step for step in recorded.steps(folder) if step > done]) and not _recorded_there(run_dir, folder):
        raise UserError(f"debug.record = '{folder}' holds another run's recording ({recorded.in_words(steps)}), which this one would overwrite; "
                        "name another folder, or remove it first")


def _recorded_there(run_dir: Path, folder: Path) -> bool:
    """Whether the run that was begun in run_dir recorded into this folder."""
    try:
        name = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))["debug"]["record"]
        return isinstance(name, str) and Path(name).resolve() == folder.resolve()
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return False


def make_folder(folder: Path) -> None:
    """The folder of debug.record. Raises UserError where it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"debug.record = '{folder}' cannot be made: {error.strerror}; name a folder") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"debug.record = '{folder}': nothing can be written there; name another folder")


class Recorder:
    """An engine whose training groups (not its greedy evaluation) are also written to `folder`.

    From the first step that it records, the folder is this run's alone (`refuse_unusable` has seen to it): each replica writes its files anew and removes
    its later ones, and the first removes those of replicas that this run does not have. Earlier steps stay: a resumed run goes on after them.
    """

    def __init__(self, engine: RolloutEngine, folder: Path, replica: int, replicas: int = 1) -> None:
        self._engine, self._folder, self._replica, self._replicas, self.version = engine, folder, replica, replicas, engine.version
        self._begun: set[int] = set()
        make_folder(folder)

    def generate(self, prompts: list[Prompt], *, n: int, step: int, seed: int, temperature: float, max_new_tokens: int,
                 on_group: OnGroup | None = None, on_progress: OnProgress | None = None) -> list[Group]:
        if step:
            self._begun.add(step)  # steps ahead of the policy may be at work in other threads
        groups = self._engine.generate(prompts, n=n, step=step, seed=seed, temperature=temperature, max_new_tokens=max_new_tokens,
                                       on_group=on_group, on_progress=on_progress)
        if step:
            lines = (json.dumps({"id": g.prompt.id, "responses": [asdict(r) for r in g.responses]}) + "\n" for g in groups)
            (self._folder / f"step_{step}-{self._replica}.jsonl").write_text("".join(lines))
            self._drop_stale()
        return groups

    def _drop_stale(self) -> None:
        """Each file is of one replica's care, so that it does not matter which are at work meanwhile."""
        first = min(self._begun)
        for file in self._folder.glob("step_*-*.jsonl"):
            if not (named := recorded.NAME.fullmatch(file.name)) or int(named[1]) < first:
                continue
            step, replica = int(named[1]), int(named[2])
            if (replica == self._replica and step not in self._begun) or (self._replica == 0 and replica >= self._replicas):
                file.unlink(missing_ok=True)

    def send(self, source: WeightSource, version: int) -> dict[str, float]:
        times = self._engine.send(source, version)
        self.version = version
        return times

    def counters(self) -> dict[str, float]:
        return self._engine.counters()

    def sleep(self) -> None:
        self._engine.sleep()

    def tend(self) -> None:
        self._engine.tend()

    def close(self) -> None:
        self._engine.close()


class Replay:
    """The recorded responses in place of an engine's. Prompts must be those that the recording run drew, on any number of replicas."""

    def __init__(self, folder: Path) -> None:
        recorded.refuse_missing(folder)
        self._folder, self.version = folder, 0

    def generate(self, prompts: list[Prompt], *, n: int, step: int, seed: int, temperature: float, max_new_tokens: int,
                 on_group: OnGroup | None = None, on_progress: OnProgress | None = None) -> list[Group]:
        kept = self._read(step)
        groups = []
        for prompt in prompts:
            responses = kept.get(prompt.id)
            if responses is None or len(responses) != n:
                found = "no response" if responses is None else f"{len(responses)} responses"
                raise UserError(f"debug.replay = '{self._folder}': step {step} has {found} to prompt '{prompt.id}' instead of {n}; "
                                "data, run.seed, rollout.n and rollout.prompts_per_step must be the recording run's")
            groups.append(Group(prompt=prompt, responses=responses, step=step))
            if on_group:
                on_group(groups[-1])
            if on_progress:
                on_progress(len(groups) * n, len(prompts) * n, sum(len(r.token_ids) for g in groups for r in g.responses))
        return groups

    def send(self, source: WeightSource, version: int) -> dict[str, float]:
        for _ in source.weights():  # gathering is a collective: the peers iterate too
            pass
        self.version = version
        return {}

    def counters(self) -> dict[str, float]:
        return {}

    def sleep(self) -> None:
        pass

    def tend(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _read(self, step: int) -> dict[str, list[Response]]:
        files = sorted(self._folder.glob(f"step_{step}-*.jsonl"))
        if not files:
            raise UserError(f"debug.replay = '{self._folder}': step {step} was not recorded")
        found: dict[str, list[Response]] = {}
        for file in files:
            for i, line in enumerate(_lines(file), 1):
                prompt, responses = self._line(line, f"{file.name}:{i}")
                if [r.token_ids for r in found.setdefault(prompt, responses)] != [r.token_ids for r in responses]:
                    raise UserError(f"debug.replay = '{self._folder}': {file.name}:{i} answers prompt '{prompt}' of step {step} a second time and differently, "
                                    "so that two runs are mixed there; record the step anew, into an empty folder")
        return found

    def _line(self, text: str, where: str) -> tuple[str, list[Response]]:
        """A prompt's id and its responses."""
        try:
            line: dict[str, Any] = json.loads(text)
            return str(line["id"]), [Response(**r) for r in line["responses"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"debug.replay = '{self._folder}': {where} is no recorded prompt ({type(error).__name__}: {error}); "
                            "it may be cut short: record the step anew") from None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"debug.replay = '{file.parent}': {file.name} cannot be read: {error}") from None
