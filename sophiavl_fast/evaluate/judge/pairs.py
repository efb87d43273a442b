"""`--layout vl-rewardbench`: which of two responses is better, asked in both orders.

A record holds id, query, response (two texts), image, and human_ranking ([0, 1]: the first is better). A pair counts as right
only where the better response wins in both orders; each order's own accuracy and the share of first places chosen show a
position bias, which asking in one order hides (a judge that always says 1 would have everything or nothing).
A judge that gives scores (mode `score`) is asked about each response alone; equal scores decide nothing, and are wrong.
"""
from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sophiavl_fast.config import Thinking
from sophiavl_fast.errors import UserError
from sophiavl_fast.evaluate.judge.ask import in_order
from sophiavl_fast.rewards.model.panel import Asking, JudgeSpec
from sophiavl_fast.rewards.model.traces import lines, resolve
from sophiavl_fast.rewards.thinking import template
from sophiavl_fast.rewards.thinking.caller import BudgetSpent, Caller
from sophiavl_fast.rewards.thinking.chat import image_part
from sophiavl_fast.rewards.thinking.parse import Score

PROMPT = Path(__file__).with_name("pair_prompt.yaml")
_TAG = ("<answer>", "</answer>")
_CHOICE = re.compile(r"(?<![\w.])[12](?![\w.]*\d)(?!\w)")
PROBES = 3  # pairs that show whether the judge compares or scores


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one question; `better` is 0 or 1."""

    id: str
    question: str
    images: tuple[str, ...]
    responses: tuple[str, str]
    better: int

    @property
    def category(self) -> str:
        """By the benchmark's own ids: general, hallucination or reasoning."""
        name = self.id.casefold()
        if "mmmu" in name or "mathverse" in name:
            return "reasoning"
        return "hallucination" if any(word in name for word in ("hallucination", "rlhf", "rlaif")) else "general"


class Verdict(NamedTuple):
    """Which response won in the order given, and with the order swapped: 0, 1, or None where the judge did not decide."""

    given: int | None
    swapped: int | None
    error: str = ""


def read_pairs(source: Path) -> list[Pair]:
    """A .jsonl file, or a .json list. Raises UserError with the place of the first record that is no pair."""
    if not source.is_file():
        raise UserError(f"--input '{source}' does not exist")
    if source.suffix == ".json":
        try:
            rows = [(f"{source}[{i}]", value) for i, value in enumerate(json.loads(source.read_text()))]
        except (ValueError, TypeError) as error:
            raise UserError(f"--input '{source}' is not JSON: {error}") from None
    else:
        rows = [(f"{source}:{number}", value) for _, _, number, value in lines(source)]
    if not rows:
        raise UserError(f"--input '{source}' holds no pair")
    return [_pair(value, where) for where, value in rows]


def _pair(value: Any, where: str) -> Pair:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a record, not {type(value).__name__}")
    query, responses, ranking = value.get("query", value.get("question")), value.get("response"), value.get("human_ranking")
    images = value.get("images", value.get("image")) or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(query, str) or not isinstance(responses, list) or len(responses) != 2 or not all(isinstance(r, str) for r in responses):
        raise UserError(f"{where}: expected 'query' and 'response', a list of two texts")
    if ranking not in ([0, 1], [1, 0]):
        raise UserError(f"{where}: human_ranking is {ranking!r}, expected [0, 1] (the first is better) or [1, 0]")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UserError(f"{where}: 'image' must be a path, or a list of paths")
    return Pair(str(value.get("id", where)), query, tuple(images), (responses[0], responses[1]), ranking.index(0))


async def on_pairs(source: Path, judge: JudgeSpec, asking: Asking, *, mode: str, open_image: Callable[[str], Any], images: str) -> dict[str, Any]:
    """The result over all pairs; mode `auto` asks the first ones to compare, and scores where that is not understood. Raises UserError."""
    pairs = read_pairs(source)
    if mode == "auto":
        tried = [await _one(Comparing, pair, judge, asking, source, open_image, images) for pair in pairs[:PROBES]]
        mode = "compare" if any(v.given is not None or v.swapped is not None for v in tried) else "score"
    asker = (Comparing if mode == "compare" else Scoring)(judge, asking)
    try:
        await asker.caller.probe(strict=False)
        verdicts = await in_order(pairs, lambda pair: asker.verdict(pair, source, open_image, images), at_once=asking.concurrency, what="pairs")
    finally:
        await asker.caller.close()
    if all(v.given is None and v.swapped is None for v in verdicts):
        raise UserError(f"no pair could be decided: {next((v.error for v in verdicts if v.error), 'every score is a tie')}")
    return {"mode": mode, **accuracy(pairs, verdicts)}


async def _one(kind: type[Comparing], pair: Pair, judge: JudgeSpec, asking: Asking, source: Path, open_image: Any, images: str) -> Verdict:
    asker = kind(judge, asking)
    try:
        await asker.caller.probe(strict=False)
        return await asker.verdict(pair, source, open_image, images)
    finally:
        await asker.caller.close()


class Comparing:
    """Both responses in one prompt; the reply names 1 or 2."""

    compares = True

    def __init__(self, judge: JudgeSpec, asking: Asking) -> None:
        config = Thinking(backend="endpoint", url=judge.url, model=judge.model, template=asking.template, score="parse", concurrency=asking.concurrency,
                          timeout_s=asking.timeout_s, retries=asking.retries)
        self._template = template.load(asking.template)
        text = yaml.safe_load(PROMPT.read_text(encoding="utf-8"))["user"]
        self._prompt = ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(text)
        self.caller = Caller(config, self._template, key_variable=judge.key_variable, longest_wait_s=4.0, ask_again=1, learn=True, budget=asking.budget,
                             read=choice if self.compares else None)


    async def verdict(self, pair: Pair, source: Path, open_image: Callable[[str], Any], images: str) -> Verdict:
        """Both orders of one pair."""
        try:
            parts = [await asyncio.to_thread(_encoded, path, source, open_image, images) for path in pair.images]
        except UserError as error:
            return Verdict(None, None, str(error))
        try:
            return await self._ask(pair, parts)
        except BudgetSpent:
            return Verdict(None, None, "the budget was spent")

    async def _ask(self, pair: Pair, parts: list[dict[str, Any]]) -> Verdict:
        first, second = pair.responses
        texts = self._text(pair, first, second), self._text(pair, second, first)
        given, swapped = await asyncio.gather(*(self.caller.score(text, parts) for text in texts))
        return Verdict(_place(given.value), None if math.isnan(swapped.value) else 1 - int(swapped.value), given.reason or swapped.reason)

    def _text(self, pair: Pair, first: str, second: str) -> str:
        say = template.harmless
        return self._prompt.render(question=say(pair.question.replace("<image>", "").strip()), first=say(first), second=say(second))


class Scoring(Comparing):
    """Each response alone, by the judge's template; the higher score wins."""

    compares = False

    async def _ask(self, pair: Pair, parts: list[dict[str, Any]]) -> Verdict:
        a, b = await asyncio.gather(*(self.caller.score(self._template.user(pair.question, response), parts) for response in pair.responses))
        won = None if math.isnan(a.value) or math.isnan(b.value) or a.value == b.value else int(b.value > a.value)
        return Verdict(won, won, a.reason or b.reason)


def choice(text: str) -> Score:
    """0.0 for a reply that chooses response 1, 1.0 for 2, NaN where it does neither: the last answer block, else the last 1 or 2 of the text."""
    tagged = _last_block(text)
    found = _CHOICE.findall(text if tagged is None else tagged)
    if not found or (tagged is not None and len(set(found)) > 1):
        return Score(math.nan, f"judge's reply: neither 1 nor 2 in '{' '.join(text.split())[:60]}'")
    return Score(float(found[-1] == "2"))


def _last_block(text: str) -> str | None:
    """What stands in the last complete answer block. Plain search: a regular expression is quadratic in blocks that are not closed."""
    found, at = None, 0
    while (start := text.find(_TAG[0], at)) >= 0 and (end := text.find(_TAG[1], start)) >= 0:
        found, at = text[start + len(_TAG[0]):end], end + len(_TAG[1])
    return found


def _encoded(path: str, source: Path, open_image: Callable[[str], Any], images: str) -> dict[str, Any]:
    return image_part(open_image(resolve(path, source, images)))


def _place(value: float) -> int | None:
    return None if math.isnan(value) else int(value)


def accuracy(pairs: Sequence[Pair], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Shares over all pairs; what was not decided is wrong. first_chosen: 0.5 without position bias; longer_chosen beside longer_better."""
    rows = list(zip(pairs, verdicts, strict=True))
    right = [v.given == p.better and v.swapped == p.better for p, v in rows]
    asked = [place for p, v in rows for place in (v.given, None if v.swapped is None else 1 - v.swapped) if place is not None]
    unequal = [(p, v) for p, v in rows if len(p.responses[0]) != len(p.responses[1])]
    choices = [(v_, int(len(p.responses[1]) > len(p.responses[0]))) for p, v in unequal for v_ in (v.given, v.swapped) if v_ is not None]
    categories = {c: [ok for ok, p in zip(right, pairs, strict=True) if p.category == c] for c in sorted({p.category for p in pairs})}
    by_category: dict[str, dict[str, Any]] = {c: {"count": len(found), "accuracy": _share(found)} for c, found in categories.items()}
    return {
        "count": len(pairs), "accuracy": _share(right), "macro_accuracy": sum(c["accuracy"] or 0.0 for c in by_category.values()) / len(by_category),
        "accuracy_as_given": _share([v.given == p.better for p, v in rows]), "accuracy_swapped": _share([v.swapped == p.better for p, v in rows]),
        "accuracy_mean_of_orders": _share([x == p.better for p, v in rows for x in (v.given, v.swapped)]),
        "consistent": _share([v.given is not None and v.given == v.swapped for _, v in rows]),
        "first_chosen": _share([place == 0 for place in asked]), "undecided": sum((v.given is None) + (v.swapped is None) for _, v in rows),
        "longer_chosen": _share([won == longer for won, longer in choices]),
        "longer_better": _share([p.better == int(len(p.responses[1]) > len(p.responses[0])) for p, _ in unequal]),
        "categories": by_category, "pairs": [{"id": p.id, "category": p.category, "better": p.better, "given": v.given, "swapped": v.swapped,
                                              "error": v.error or None} for p, v in rows],
    }


def _share(found: Sequence[bool]) -> float | None:
    return sum(found) / len(found) if found else None
