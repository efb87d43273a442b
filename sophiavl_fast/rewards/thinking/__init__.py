"""The thinking reward: a judge scores each response's reasoning in [0, 1] (paper section 3.2). NaN: no score could be had."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from sophiavl_fast.config import Config
from sophiavl_fast.errors import UserError
from sophiavl_fast.rewards.thinking import template

if TYPE_CHECKING:
    import torch  # the commands that only ask a server must not pay for it


@dataclass(frozen=True, slots=True)
class Case:
    """What a judge sees of a group: one question with its images, and the reasoning of each response to be scored.

    `seeds` [n][K]: one a response and sample, used only where thinking.samples > 1.
    """

    question: str
    images: Sequence[Any]
    reasonings: Sequence[str]
    answers: Sequence[str]
    seeds: Sequence[Sequence[int]]


class Verdict(NamedTuple):
    """The K scores of one response, NaN where there is none; `reason` then says why, on one line."""

    values: tuple[float, ...]
    reason: str = ""


class Judge(Protocol):
    """`submit` may begin at once, `collect` waits and returns a verdict for each reasoning of each case, in order."""

    def submit(self, case: Case) -> Any: ...

    def collect(self, tickets: Sequence[Any]) -> list[list[Verdict]]: ...

    def close(self) -> None: ...


def load_template(config: Config) -> template.JudgeTemplate:
    """The judge's prompt. Raises UserError: no such template, a malformed one, or one without a place for the answer that it should show."""
    loaded = template.load(config.thinking.template)
    if config.thinking.include_answer and not loaded.shows_answer:
        raise UserError(f"thinking.include_answer is set, but thinking.template '{loaded.name}' has no place for the answer")
    return loaded


def open_judge(config: Config, device: torch.device, key: str = "") -> Judge | None:
    """The judge of the config, None where nobody asks for thinking scores. Raises UserError for what cannot be opened."""
    if config.thinking.backend == "off" or config.algorithm.name == "grpo":
        return None
    loaded = load_template(config)
    if config.thinking.backend == "local":
        from sophiavl_fast.rewards.thinking.local import LocalJudge

        return LocalJudge(config.thinking, loaded, device)
    from sophiavl_fast.rewards.thinking.endpoint import EndpointJudge

    return EndpointJudge(config.thinking, loaded, key=key)
