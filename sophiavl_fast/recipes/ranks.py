"""What a step looks like from ranks that hold no prompts, and from a step whose groups lie on several replicas."""
from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sophiavl_fast.config import Config
from sophiavl_fast.monitor import RunLog
from sophiavl_fast.types import Group, Scores, WeightSource


class Follower:
    """The rollout of a lead's peers: it samples nothing, but takes part in gathering the weights that the lead sends."""

    version = 0

    def generate(self, *_: Any, **__: Any) -> list[Group]:
        return []

    def send(self, source: WeightSource, version: int) -> dict[str, float]:
        for _ in source.weights():
            pass
        self.version = version
        return {}

    def close(self) -> None:
        pass


class NoLog:
    """The run's log on every rank but the first."""

    def metrics(self, step: int, values: dict[str, Any]) -> list[str]:
        return []

    def samples(self, records: Iterable[dict[str, Any]]) -> None: ...

    def close(self) -> None: ...


def open_log(run_dir: Path, config: Config, resume_step: int | None) -> RunLog | NoLog:
    """The run's log: one rank writes it."""
    return RunLog(run_dir, config, resume_step=resume_step) if os.environ.get("RANK", "0") == "0" else NoLog()


@dataclass(slots=True)
class Step:
    """Scores of all replicas' responses; `sizes`: responses of each group; `firsts`: the first response of each replica;
    `skipped`: unusable records that any replica met so far."""

    scores: Scores
    sizes: list[int]
    firsts: list[int]
    skipped: int

    def rows(self, replica: int) -> slice:
        """This replica's responses among all."""
        return slice(self.firsts[replica], self.firsts[replica + 1])


def joined(parts: list[tuple[Scores, list[int], int]]) -> Step:
    """One Step from (scores, group sizes, records skipped) of each replica, in their order."""
    firsts = [0]
    for scores, _, _ in parts:
        firsts.append(firsts[-1] + len(scores.outcome))
    each = [s for s, _, _ in parts]
    thinking = [s.thinking for s in each if s.thinking is not None]
    return Step(
        Scores(outcome=torch.cat([s.outcome for s in each]), format_ok=torch.cat([s.format_ok for s in each]),
               thinking=torch.cat(thinking) if thinking else None, killed=sum(s.killed for s in each),
               reasons={first + row: why for first, s in zip(firsts, each) for row, why in s.reasons.items()}),
        [n for _, sizes, _ in parts for n in sizes], firsts, sum(skipped for _, _, skipped in parts))
