"""What a step looks like from ranks that hold no prompts, and from a step whose groups lie on several replicas."""
from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sophiavl_fast.config import Config
from sophiavl_fast.monitor import Progress, RunLog
from sophiavl_fast.monitor.progress import Timer
from sophiavl_fast.policy import Policy, checkpoint
from sophiavl_fast.rollout import RolloutEngine
from sophiavl_fast.types import Group, Prompt, Scores, WeightSource


class Lead:
    """A lead's rollout: its peers are told whenever it goes through the policy's weights, which they gather with it.

    After each use of the engines both sides call `end_round`; until then the peers stand by, since an engine that was
    started anew may want the weights at any time.
    """

    def __init__(self, rollout: RolloutEngine, policy: Policy) -> None:
        self._rollout, self._policy = rollout, policy

    @property
    def version(self) -> int:
        return self._rollout.version

    def generate(self, prompts: list[Prompt], **settings: Any) -> list[Group]:
        return self._rollout.generate(prompts, **settings)

    def send(self, source: WeightSource, version: int) -> dict[str, float]:
        times = self._rollout.send(_Announced(self._policy), version)
        self.end_round()
        return times

    def sleep(self) -> None:
        self._rollout.sleep()
        self.end_round()    # the peers begin with what needs the memory once it is theirs

    def tend(self) -> None:
        self._rollout.tend()

    def counters(self) -> dict[str, float]:
        return self._rollout.counters()

    def end_round(self) -> None:
        self._policy.layout.share("end")

    def close(self) -> None:
        self._rollout.close()


class _Announced:
    """The policy's weights; each pass over them begins with a word to the peers."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self.frozen = policy, policy.frozen

    def weights(self, *, trained_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        self._policy.layout.share("trained" if trained_only else "all")
        yield from self._policy.weights(trained_only=trained_only)


class Follower:
    """The rollout of a lead's peers: it samples nothing, but takes part in gathering the weights that the lead sends."""

    version = 0

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def generate(self, *_: Any, **__: Any) -> list[Group]:
        return []

    def send(self, source: WeightSource, version: int) -> dict[str, float]:
        self.end_round()
        self.version = version
        return {}

    def sleep(self) -> None:
        self.end_round()

    def tend(self) -> None:
        pass

    def counters(self) -> dict[str, float]:
        return {}

    def end_round(self) -> None:
        """Gather with the lead until it says that its round is over."""
        while (which := self._policy.layout.share(None)) != "end":
            for _ in self._policy.weights(trained_only=which == "trained"):
                pass

    def close(self) -> None:
        pass


@contextmanager
def engines_asleep(rollout: Lead | Follower, policy: Policy, progress: Progress) -> Iterator[Timer | None]:
    """Within the block the memory of engines on the same GPUs is the trainer's, where `rollout.sleep` says so; yields the seconds that it took.

    It ends when all ranks are through with theirs: who next wants the engines, for weights or for rollouts, wakes them.
    """
    if not policy.config.rollout.sleep:
        yield None
        return
    with progress.phase("sleep") as timer:
        rollout.sleep()
        policy.layout.wait("the engines' falling asleep")   # here, not in the update's collectives: one of them may take long
    yield timer
    policy.layout.wait("the end of the engines' sleep")


class NoLog:
    """The run's log on every rank but the first."""

    def metrics(self, step: int, values: dict[str, Any]) -> list[str]:
        return []

    def samples(self, records: Iterable[dict[str, Any]]) -> None: ...

    def close(self) -> None: ...


def open_log(run_dir: Path, config: Config, resume_step: int | None, found: Path | None = None) -> RunLog | NoLog:
    """The run's log: one rank writes it. What lies beyond the step of the checkpoint `found`, from which the run goes on, is cut from the log, and checkpoints
    of the course that it left are set aside: run.resume=auto would take them up after a kill, with the log of another course."""
    if os.environ.get("RANK", "0") != "0":
        return NoLog()
    # before the log is cut: a kill in between finds both in step
    if resume_step is not None and found and (moved := checkpoint.set_aside(run_dir, resume_step, found)):
        print(f"sophiavl-fast: going on from step {resume_step}: other checkpoints of '{run_dir}' are set aside as {', '.join(p.name for p in moved)}; "
              "delete them, or name one in run.resume", file=sys.stderr, flush=True)
    return RunLog(run_dir, config, resume_step=resume_step)


def engine_metrics(sent: dict[str, float], counters: list[dict[str, float]]) -> dict[str, float]:
    """The last transfer's seconds by phase and bytes; over all replicas: restarts of engines, requests redone, engines left."""
    phases = {(f"time/transfer_{k}" if k.endswith("_s") else f"transfer/{k}"): v for k, v in sent.items()}
    return phases | {f"rollout/{k}": sum(c[k] for c in counters) for k in counters[0]}


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
    thinking, overlong = ([x for x in parts if x is not None] for parts in ([s.thinking for s in each], [s.overlong for s in each]))
    return Step(
        Scores(outcome=torch.cat([s.outcome for s in each]), format_ok=torch.cat([s.format_ok for s in each]),
               thinking=torch.cat(thinking) if thinking else None, overlong=torch.cat(overlong) if overlong else None, killed=sum(s.killed for s in each),
               reasons={first + row: why for first, s in zip(firsts, each) for row, why in s.reasons.items()}),
        [n for _, sizes, _ in parts for n in sizes], firsts, sum(skipped for _, _, skipped in parts))
