"""The whole room in one object: outcome and thinking scores of groups, begun as early as each allows."""
from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

from sophiavl_fast.config import Config
from sophiavl_fast.rewards.outcome import OutcomeScorer
from sophiavl_fast.rewards.outcome import Pending as Outcomes
from sophiavl_fast.rewards.overlong import overlong
from sophiavl_fast.rewards.thinking import Case, Judge, open_judge
from sophiavl_fast.types import Group, Scores, derive_seed

REPO_LEAST_OUTCOME = 0.2      # the public code asks its judge only about responses at or above this, and takes 0 for the others,
REPO_UNIFORM = (0.1, 0.9)     # and about nobody where all outcomes of a group are at most, or at least, this


class _Started(NamedTuple):
    group: Group
    outcomes: Outcomes
    ticket: Any


class Rewards:
    """`start(group)` as soon as a group is finished (optional), `score(groups)` for the step's Scores, `close()` at the end.

    device: where a local judge runs; judge_key: what the endpoint wants, "" for OPENAI_API_KEY. Raises UserError for a judge that cannot be opened.
    """

    def __init__(self, config: Config, *, device: torch.device | str, judge_key: str = "") -> None:
        self._config = config
        self._outcome = OutcomeScorer(config.rewards)
        self._started: dict[int, _Started] = {}
        self._closed = False
        self._judge = open_judge(config, torch.device(device), judge_key)
        # the public code must know a response's outcome before it asks about it
        self._selective = self._judge is not None and config.trust.mode == "repo"

    def start(self, group: Group) -> None:
        """Begin to score a finished group while others are still being sampled; from any thread. A group may be started once.

        Does nothing after `close`: a run that ends early has requests of a step ahead still in flight."""
        if self._closed:
            return
        outcomes = self._outcome.start(group)
        ticket = None if self._judge is None or self._selective else self._judge.submit(self._case(group, outcomes))
        self._started[id(group)] = _Started(group, outcomes, ticket)

    def score(self, groups: list[Group]) -> Scores:
        """Scores of every response, groups in order. Raises UserError for an unknown problem type, or with thinking.on_error: fail."""
        began = time.perf_counter()
        for group in groups:
            if id(group) not in self._started:
                self.start(group)
        started = [self._started.pop(id(group)) for group in groups]
        scores = self._outcome.finish([entry for s in started for entry in s.outcomes])
        if self._judge is not None:
            self._think(self._judge, started, scores)
        scores.overlong = overlong(groups, self._config)
        scores.seconds = time.perf_counter() - began
        return scores

    def _case(self, group: Group, outcomes: Outcomes, rows: list[int] | None = None) -> Case:
        """The group for the judge; `rows`: only these of its responses."""
        rows = list(range(len(outcomes))) if rows is None else rows
        prompt, parsed = group.prompt, [outcomes[i][0] for i in rows]
        seeds = [[derive_seed(self._config.run.seed, "judge", group.step, prompt.id, i, k) for k in range(self._config.thinking.samples)] for i in rows]
        return Case(prompt.question, prompt.images, [p.reasoning for p in parsed], [p.answer for p in parsed], seeds)

    def _think(self, judge: Judge, started: list[_Started], scores: Scores) -> None:
        """Fill in scores.thinking and the reasons of its NaNs."""
        if self._selective:
            asked = self._worth_asking(started, scores.outcome)
            tickets = [judge.submit(self._case(s.group, s.outcomes, rows)) for s, rows in zip(started, asked, strict=True)]
        else:
            asked = [list(range(len(s.outcomes))) for s in started]
            tickets = [s.ticket for s in started]
        thinking = torch.zeros(len(scores.outcome), self._config.thinking.samples)
        first = 0
        for s, rows, verdicts in zip(started, asked, judge.collect(tickets), strict=True):
            for place, verdict in zip(rows, verdicts, strict=True):
                thinking[first + place] = torch.tensor(verdict.values)
                if verdict.reason:
                    scores.reasons[first + place] = "; ".join(filter(None, (scores.reasons.get(first + place), verdict.reason)))
            first += len(s.outcomes)
        scores.thinking = thinking if self._config.thinking.samples > 1 else thinking[:, 0]

    @staticmethod
    def _worth_asking(started: list[_Started], outcome: torch.Tensor) -> list[list[int]]:
        """trust.mode repo: the responses that the public code asks about; the others' thinking score is 0 by definition, not NaN."""
        out = []
        for values in outcome.split([len(s.outcomes) for s in started]):
            low, high = REPO_UNIFORM
            uniform = bool((values <= low).all() or (values >= high).all())
            out.append([] if uniform else (values >= REPO_LEAST_OUTCOME).nonzero()[:, 0].tolist())
        return out

    def close(self) -> None:
        """End graders and judge."""
        self._closed = True
        self._outcome.close()
        if self._judge is not None:
            self._judge.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
