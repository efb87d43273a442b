"""Traces with scores for the demo's thinking reward model: sound ones, the policy's own slips, and corrupted ones.

The score is the share of right lines that `soundness` counts, as text with one decimal. It never depends on the answer,
which the judge does not see.
"""
from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Template

from sophiavl_fast.data import templates
from sophiavl_fast.data.demo import soundness, traces
from sophiavl_fast.data.demo.questions import Question

# read as a file: the data room imports nothing of the rewards room
TEMPLATE = Path(__file__).parents[2] / "rewards" / "templates" / "demo_judge.yaml"
SOUND_SHARE, SLIP_SHARE = 0.4, 0.36  # of the traces; the rest are corrupted


def misread(question: Question, rng: random.Random) -> list[str]:
    """One digit read as another, and all the rest right for what was read."""
    return _sound_lines(_with_other_digit(question, rng))


def off_by_one(question: Question, rng: random.Random) -> list[str]:
    """The last number of one step is one too many."""
    lines = _sound_lines(question)
    at = rng.randrange(1, len(lines))
    lines[at] = re.sub(r"\d+(?=\D*$)", lambda number: str(int(number[0]) + 1), lines[at])
    return lines


def missing(question: Question, rng: random.Random) -> list[str]:
    """One line left out."""
    lines = _sound_lines(question)
    del lines[rng.randrange(len(lines))]
    return lines


def repeated(question: Question, rng: random.Random) -> list[str]:
    """One line written twice."""
    lines = _sound_lines(question)
    at = rng.randrange(len(lines))
    return lines[:at + 1] + lines[at:]


def astray(question: Question, rng: random.Random) -> list[str]:
    """The right reading, then the steps for another row."""
    return _sound_lines(question)[:1] + _sound_lines(_with_other_digit(question, rng))[1:]


def half_misread(question: Question, rng: random.Random) -> list[str]:
    """A wrong reading, then the right steps all the same."""
    return _sound_lines(_with_other_digit(question, rng))[:1] + _sound_lines(question)[1:]


Corruption = Callable[[Question, random.Random], list[str]]
TRAINED: dict[str, Corruption] = {f.__name__: f for f in (misread, off_by_one, missing, repeated)}
HELD_OUT: dict[str, Corruption] = {f.__name__: f for f in (astray, half_misread)}  # the judge never trained on these


def draw(question: Question, rng: random.Random, *, held_out: bool) -> tuple[str, str]:
    """A trace to be judged and its flavour: sound, slip or the name of a corruption; `held_out` adds the unseen ones."""
    luck = rng.random()
    slip = traces.slip(question)
    if luck < SOUND_SHARE:
        return "\n".join(_sound_lines(question)), "sound"
    if slip and luck < SOUND_SHARE + SLIP_SHARE:
        return "\n".join(slip.lines), "slip"
    ways = TRAINED | HELD_OUT if held_out else TRAINED
    name = rng.choice(list(ways))
    return "\n".join(ways[name](question, rng)), name


def score_text(record: Mapping[str, Any], trace: str) -> str:
    """The label: the share of right lines, '0.0' to '1.0'."""
    return f"{soundness.check_trace(record, trace).score:.1f}"


def prompt_text(record: Mapping[str, Any], reasoning: str) -> str:
    """What the thinking reward model is asked, by the packaged template that the rewards use too."""
    asked = templates.load("plain").question(record["problem"], problem_type=record["problem_type"], options=record["options"])
    return _template().render(question=asked, reasoning=reasoning)


@cache
def _template() -> Template:
    return Template(yaml.safe_load(TEMPLATE.read_text())["user"])


def _sound_lines(question: Question) -> list[str]:
    return list(traces.sound(question).lines)


def _with_other_digit(question: Question, rng: random.Random) -> Question:
    digits = list(question.digits)
    at = rng.randrange(len(digits))
    digits[at] = rng.choice([d for d in range(10) if d != digits[at]])
    return replace(question, digits=tuple(digits))
