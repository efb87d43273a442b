"""Traces on disk: JSONL lines of {id, question, images: [path], response}; a run's samples.jsonl is one too (`prompt` is the question).

Only offsets and 128-bit keys are held, so that half a million traces cost tens of megabytes; a line is parsed again when asked for.
"""
from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sophiavl_fast.errors import UserError
from sophiavl_fast.rewards.format import parse
from sophiavl_fast.rewards.thinking.store import content_key


@dataclass(frozen=True, slots=True)
class Trace:
    """One question with its pictures (paths as written) and one response. `row` is the line as read."""

    id: str
    question: str
    images: tuple[str, ...]
    response: str
    row: dict[str, Any]

    @property
    def reasoning(self) -> str:
        return parse(self.response).reasoning

    @property
    def answer(self) -> str:
        return parse(self.response).answer

    @property
    def key(self) -> bytes:
        """The same line in input and output has the same key."""
        return content_key((self.id, self.question, self.response, *self.images))

    def content(self, *, answer: bool) -> bytes:
        """The same for everything that a judge cannot tell apart; `answer`: it sees the answer too."""
        return content_key((self.question, self.reasoning, self.answer if answer else "", *self.images))


def as_trace(row: Any, where: str) -> Trace:
    """A parsed line as a trace. Raises UserError that begins with `where`."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a trace such as {{\"id\": .., \"question\": .., \"images\": [..], \"response\": ..}}, not {type(row).__name__}")
    question = row.get("question", row.get("prompt"))
    images = row.get("images") or []
    images = [images] if isinstance(images, str) else images
    for name, value in (("question", question), ("response", row.get("response"))):
        if not isinstance(value, str):
            raise UserError(f"{where}: '{name}' is {'missing' if value is None else 'no text'}; a trace is {{id, question, images: [path], response}}")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UserError(f"{where}: 'images' must be a list of paths")
    return Trace(str(row.get("id", where.rpartition(":")[2])), str(question), tuple(images), row["response"], row)


class Traces:
    """The traces of one file, by index. Raises UserError (file and line) for a line that is none; a torn last line is left out."""

    def __init__(self, path: Path, *, include_answer: bool = False) -> None:
        if not path.is_file():
            raise UserError(f"--input '{path}' " + ("is a folder; name a .jsonl file" if path.is_dir() else "does not exist"))
        self.path = path
        self.keys: list[bytes] = []
        self.contents: list[bytes] = []
        self._prefixes: list[int] = []
        order: dict[bytes, int] = {}
        self._places: list[tuple[int, int, int]] = []
        self._file = os.open(path, os.O_RDONLY)
        for start, end, number, row in lines(path):
            trace = as_trace(row, f"{path}:{number}")
            self._places.append((start, end - start, number))
            self.keys.append(trace.key)
            self.contents.append(trace.content(answer=include_answer))
            self._prefixes.append(order.setdefault(content_key((trace.question, *trace.images)), len(order)))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Trace:
        start, size, number = self._places[index]
        return as_trace(json.loads(os.pread(self._file, size, start)), f"{self.path}:{number}")

    def prefixes(self) -> list[int]:
        """A number for each trace, the same for those with the same pictures and question, in order of first appearance."""
        return self._prefixes

    def close(self) -> None:
        os.close(self._file)


def lines(path: Path) -> Iterator[tuple[int, int, int, Any]]:
    """(first byte, end, line number, value) of every line with something on it. Raises UserError for one that is not JSON.

    A last line without its newline that cannot be parsed is being written, or its writer was killed: it is left out.
    """
    place = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            start, place = place, place + len(raw)
            if not raw.strip():
                continue
            try:
                value = json.loads(raw)
            except (ValueError, RecursionError) as error:
                if not raw.endswith(b"\n"):
                    return
                raise UserError(f"{path}:{number}: not JSON: {error}") from None
            yield start, place, number, value


def resolve(image: str, source: Path, base: str) -> str:
    """Where a picture lies: below `base` (which it may not leave) where one is given, else beside the traces' file, else in the working folder.

    A scored file may lie elsewhere than the traces it came from: their folder stands in its settings.
    Raises UserError for a URL (pictures are read from disk only) and for a path that leaves `base`.
    """
    if "://" in image or image.startswith("data:"):
        raise UserError(f"image '{image[:80]}' is a URL; images are read from disk only: download it and name the file")
    if base:
        root, path = os.path.realpath(base), os.path.realpath(os.path.join(base, image))
        if os.path.commonpath([root, path]) != root:
            raise UserError(f"image '{image}' leaves its base folder '{root}'")
        return path
    beside = os.path.join(_home(source), image)
    return os.path.abspath(beside if os.path.exists(beside) or not os.path.exists(image) else image)


def settings_file(scored: Path) -> Path:
    """What a scored file was made with."""
    return scored.with_name(scored.name + ".settings.json")


@cache
def _home(source: Path) -> str:
    try:
        return str(json.loads(settings_file(source).read_text())["image_folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(source.parent)
