"""Writes the demo's pictures, records and registry: the same bytes for the same seed."""
from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sophiavl_fast.data.demo import digits, judge_data, questions, traces
from sophiavl_fast.data.demo.questions import KINDS, Question

PICTURES: dict[digits.Split, int] = {"train": 9000, "eval": 400}
RECORDS = {"warmup": 18000, "train": 6000, "eval": 400, "judge_train": 14000, "judge_eval": 400}
COLUMNS = {"problem": "prompt", "solution": "answer", "path": "images"}

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]


@dataclass(frozen=True)
class Picture:
    """A picture on disk (its path below the data folder), the digits on it and the scans they come from."""

    path: str
    digits: tuple[int, ...]
    scans: tuple[int, ...]


def write(out: Path, seed: int, track: Track, scale: float = 1.0, lucky: float = traces.LUCKY_SHARE) -> dict[str, int]:
    """Write everything below `out`; `scale` shrinks all counts, `lucky` is the warm start's share of right answers after wrong lines.

    Returns the records written by dataset.
    """
    albums = {split: list(track(_album(out, split, _scaled(count, scale), seed), f"{split} pictures", _scaled(count, scale)))
              for split, count in PICTURES.items()}
    registry, counts = {}, {}
    for name, full in RECORDS.items():
        count = _scaled(full, scale)
        album = albums["eval" if name.endswith("eval") else "train"]
        rows = track(_records(name, album, count, random.Random(f"{seed}:{name}"), lucky), f"{name} records", count)
        with (out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        entry = {"file_path": f"{name}.jsonl", "image_base_path": ".", "columns": COLUMNS, "template": "plain"}
        registry[f"demo_{name}"] = entry if name.startswith("judge") else entry | {"reasoning_check": "demo_digits"}
        counts[f"demo_{name}"] = count
    (out / "dataset_info.json").write_text(json.dumps(registry, indent=2) + "\n")
    return counts


def _scaled(count: int, scale: float) -> int:
    return max(8, round(count * scale))


def _album(out: Path, split: digits.Split, count: int, seed: int) -> Iterator[Picture]:
    rng = random.Random(f"{seed}:{split} pictures")
    (out / "images" / split).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        shown = questions.draw_digits(rng)
        picture, scans = digits.row(shown, split, rng)
        path = f"images/{split}/{i:05d}.png"
        picture.save(out / path)
        yield Picture(path, shown, tuple(scans))


def _records(name: str, album: list[Picture], count: int, rng: random.Random, lucky: float) -> Iterator[dict[str, Any]]:
    """Records with the truth for train and eval, with a drawn trace and its own answer for warmup, with scored traces for the judge."""
    for i in range(count):
        kind = questions.draw_kind(rng)
        picture = album[i % len(album)] if KINDS[kind].pictured else None
        question = Question(kind, picture.digits if picture else questions.draw_digits(rng))
        row = record(question, picture, i)
        if name == "warmup":
            trace = traces.draw(question, rng, lucky)
            row |= {"process": trace.process, "solution": _wrapped(trace.answer), "flavour": trace.flavour}
        elif name.startswith("judge"):
            row = _judged(row, question, rng, held_out=name == "judge_eval")
        yield row


def record(question: Question, picture: Picture | None, number: int) -> dict[str, Any]:
    """A SophiaVL-R1 record, what the soundness rule needs (`kind`, `digits`), and the scans shown."""
    return {
        "problem_id": number, "problem": question.problem, "data_type": "image" if picture else "text",
        "problem_type": KINDS[question.kind].problem_type, "options": question.options, "process": "",
        "solution": _wrapped(question.answer), "path": picture.path if picture else "", "data_source": "demo",
        "kind": question.kind, "digits": list(question.digits), "scans": list(picture.scans if picture else ()),
    }


def _judged(row: dict[str, Any], question: Question, rng: random.Random, *, held_out: bool) -> dict[str, Any]:
    """The record of a judge's question: score this trace. The options are part of the text already."""
    trace, flavour = judge_data.draw(question, rng, held_out=held_out)
    return row | {"problem": judge_data.prompt_text(row, trace), "problem_type": "numerical", "options": [], "reasoning": trace, "flavour": flavour,
               "solution": _wrapped(judge_data.score_text(row, trace))}


def _wrapped(answer: str) -> str:
    return f"<answer>{answer}</answer>"
