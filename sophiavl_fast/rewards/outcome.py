"""Outcome rewards by problem type (paper section 3.3), behind the format gate.

Ranges: numerical and multiple choice 0 or 1; OCR exp(-WER) in (0, 1]; free-form and text mean ROUGE in [0, 1]. A
response that breaks the format earns 0 (the authors, SophiaVL-R1 issue 8). So does one whose grader had to be killed:
that is counted in Scores.killed and named in Scores.reasons. Under rewards.ocr = neg_wer, where 0 would be the best
outcome of all, both earn -1 instead: the error rate of an empty transcription.
"""
from __future__ import annotations

import time
from concurrent.futures import Future

import torch

from sophiavl_fast.config import Rewards as RewardsConfig
from sophiavl_fast.rewards.format import Parsed, parse
from sophiavl_fast.rewards.graders import grader, quick
from sophiavl_fast.rewards.graders.task import Task
from sophiavl_fast.rewards.sandbox import Grade, Sandbox
from sophiavl_fast.types import Group, Scores

Pending = list[tuple[Parsed, Grade | Future[Grade]]]


class OutcomeScorer:
    """Grades what is quick and sure at once, in the calling thread; the rest goes to the sandbox's workers."""

    def __init__(self, config: RewardsConfig) -> None:
        self._config = config
        self._sandbox = Sandbox(config.workers, config.timeout_s, config.memory_mb)
        self._asked: dict[Task, Future[Grade]] = {}  # since the last finish: the responses of a group often agree

    def start(self, group: Group) -> Pending:
        """Begin to grade a group, from any thread; one entry a response. Raises UserError for an unknown problem type."""
        grader(group.prompt.problem_type)
        return [self._begin(group, response.text) for response in group.responses]

    def _begin(self, group: Group, text: str) -> tuple[Parsed, Grade | Future[Grade]]:
        parsed, prompt, config = parse(text), group.prompt, self._config
        if config.format_gate and not parsed.ok:
            return parsed, Grade(self._worst(prompt.problem_type))
        task = Task(prompt.problem_type, parsed.answer, prompt.gold, tuple(prompt.options), config.ocr, config.numeric_tolerance)
        found = quick(task)
        if found is not None:
            return parsed, Grade(found)
        grade = self._asked.get(task)   # once: another thread's `finish` may clear it
        if grade is None:
            grade = self._asked[task] = self._sandbox.submit(task, self._worst(prompt.problem_type))
        return parsed, grade

    def _worst(self, problem_type: str) -> float:
        return -1.0 if problem_type == "ocr" and self._config.ocr == "neg_wer" else 0.0

    def finish(self, pending: Pending) -> Scores:
        """Wait for what is under way; bounded, since every grade has its deadline. Rows in the order of `pending`."""
        grades = [g.result() if isinstance(g, Future) else g for _, g in pending]
        self._asked.clear()
        return Scores(outcome=torch.tensor([g.outcome for g in grades], dtype=torch.float32),
                      format_ok=torch.tensor([p.ok for p, _ in pending], dtype=torch.bool),
                      reasons={row: g.killed for row, g in enumerate(grades) if g.killed}, killed=sum(bool(g.killed) for g in grades))

    def score(self, groups: list[Group]) -> Scores:
        """Outcome [B] and format [B] of every response, groups in order."""
        started = time.perf_counter()
        scores = self.finish([entry for group in groups for entry in self.start(group)])
        scores.seconds = time.perf_counter() - started
        return scores

    def close(self) -> None:
        self._sandbox.close()

    def __enter__(self) -> OutcomeScorer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
