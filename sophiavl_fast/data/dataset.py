"""A registered dataset: rows on disk -> checked examples -> prompts."""
from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sophiavl_fast.data import images, templates
from sophiavl_fast.data.limits import Limits
from sophiavl_fast.data.processor import Processor
from sophiavl_fast.data.records import open_rows
from sophiavl_fast.data.registry import Entry, find
from sophiavl_fast.errors import UserError, nearest
from sophiavl_fast.types import Prompt

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_ANSWER_TAG = re.compile(r"<\s*/?\s*answer\s*>", re.IGNORECASE)
_SPELLINGS = {"multiplechoice": "multiple_choice", "freeform": "free_form", "caption": "free_form"} | {t.replace("_", ""): t for t in templates.TYPES}


class BadRecord(UserError):
    """A record that cannot be used; the message begins with its file and line."""


@dataclass(slots=True, kw_only=True)
class Example:
    """One record in our terms. `where` is its file and line; `record` is the row as read, without image bytes."""

    id: str
    where: str
    problem: str
    problem_type: str
    gold: str
    options: list[str] = field(default_factory=list)
    process: str = ""
    images: list[images.ImageRef] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)


class Dataset:
    """Rows of one registry entry with their template; `limits`: what the run asks of each. Reads are thread-safe."""

    def __init__(self, entry: Entry, *, template: str = "sophia", limits: Limits = Limits()) -> None:
        self.entry, self.name, self.limits = entry, entry.name, limits
        if entry.problem_type:
            try:
                problem_type(entry.problem_type)
            except UserError as error:
                raise UserError(f"registry '{entry.registry}', dataset '{entry.name}': {error}") from None
        self.template = templates.load(entry.template or template)
        self._rows = open_rows(entry.file_path, entry.split, entry.missing)
        self._repeats = self._repeated_ids()
        if not len(self._rows):
            raise UserError(f"data file '{entry.file_path}' holds no record")

    @classmethod
    def open(cls, name: str, registry: str | Path = "", *, template: str = "sophia", limits: Limits = Limits()) -> Dataset:
        """By name, in a registry file beside the packaged entries. Raises UserError."""
        return cls(find(name, registry), template=template, limits=limits)

    def __len__(self) -> int:
        return len(self._rows)

    def close(self) -> None:
        self._rows.close()

    def where(self, index: int) -> str:
        """File and line of a record (index in the list for JSON and parquet)."""
        return self._rows.where(index)

    def example(self, index: int) -> Example:
        """The checked record; images are located, not read. Raises BadRecord."""
        try:
            if index in self._repeats:
                raise UserError(f"problem_id {self._id(self._rows.row(index), index)} is that of {self._rows.where(self._repeats[index])} too")
            example = self._example(index)
            self.limits.refuse(example)
            return example
        except UserError as error:
            raise BadRecord(f"{self._rows.where(index)}: {error}") from None

    def prompt(self, index: int, processor: Processor, max_tokens: int | None = None) -> Prompt:
        """The record ready for both engines. Raises BadRecord, also where it is longer than `max_tokens` or the limits."""
        example = self.example(index)
        try:
            decoded = [images.decode(i) for i in example.images]
            text, token_ids, expanded, resized, pixels, grid = processor.prepare(self._messages(example), decoded)
            self._refuse_long(len(expanded), max_tokens)
        except UserError as error:
            raise BadRecord(f"{example.where}: {error}") from None
        return Prompt(
            id=f"{self.name}:{example.id}", dataset=self.name, problem_type=example.problem_type, gold=example.gold,
            question=self.template.question(example.problem, problem_type=example.problem_type, options=example.options),
            options=example.options, process=example.process, text=text, token_ids=token_ids, expanded_ids=expanded, images=resized,
            image_paths=[i.path for i in example.images], pixel_values=pixels, image_grid_thw=grid, record=example.record,
        )

    def length(self, example: Example, processor: Processor, max_tokens: int | None = None, *, sizes: Sequence[tuple[int, int]] | None = None) -> int:
        """Prompt tokens, image tokens included, from image headers alone (or `sizes`, (height, width) each, where they were read already).

        Raises UserError above `max_tokens` or the limits: a prompt is never cut.
        """
        sizes = [images.size(i) for i in example.images] if sizes is None else sizes
        _, token_ids = processor.tokenize(self._messages(example), len(example.images))
        length = processor.expanded_length(token_ids, sizes)
        self._refuse_long(length, max_tokens)
        return length

    def _refuse_long(self, length: int, max_tokens: int | None) -> None:
        if max_tokens is not None and length > max_tokens:
            raise UserError(f"the prompt has {length} tokens, more than data.max_prompt_tokens = {max_tokens}")
        self.limits.refuse_long(length)

    def _messages(self, example: Example) -> list[dict[str, Any]]:
        return self.template.messages(example.problem, problem_type=example.problem_type, options=example.options, images=len(example.images))

    def _example(self, index: int) -> Example:
        row, entry = self._rows.row(index), self.entry
        for role in ("prompt", "answer"):
            if entry.columns[role] not in row:
                raise UserError(f"no column '{entry.columns[role]}', the record's {'question' if role == 'prompt' else 'solution'}"
                                f"{nearest(entry.columns[role], row)}")
        value = {role: _present(row.get(column)) for role, column in entry.columns.items()}
        problem = _text(value["prompt"], entry.columns["prompt"])
        if not problem.strip():
            raise UserError(f"empty question ('{entry.columns['prompt']}')")
        if str(value["data_type"]).casefold() == "video":
            raise UserError("data_type is 'video': only text and images are supported")
        found = images.references(value["images"], entry.image_base_path)
        if not found and str(value["data_type"]).casefold() == "image":
            raise UserError(f"data_type is 'image', but '{entry.columns['images']}' names none")
        record = {k: v for k, v in row.items() if k != entry.columns["images"]}
        record[entry.columns["images"]] = [i.path for i in found]
        if entry.reasoning_check:
            record.setdefault("reasoning_check", entry.reasoning_check)
        kind, options = problem_type(value["problem_type"] or entry.problem_type), _options(value["options"], entry.columns["options"])
        if kind == "multiple_choice" and len(options) > templates.MOST_OPTIONS:
            raise UserError(f"'{entry.columns['options']}' holds {len(options)} options; letters name at most {templates.MOST_OPTIONS}")
        return Example(
            id=self._id(row, index), where=self._rows.where(index), problem=problem, gold=_gold(value["answer"], entry.columns["answer"]),
            problem_type=kind, options=options,
            process=_text(value["process"], entry.columns["process"]), images=found, record=record,
        )

    def _id(self, row: Mapping[str, Any], index: int) -> str:
        given = _present(row.get(self.entry.columns["problem_id"]))
        return f"#{index}" if given in (None, "") else _whole(str(given), self.entry.columns["problem_id"])

    def _repeated_ids(self) -> dict[int, int]:
        """Index of every record whose problem_id an earlier one has -> index of that one."""
        first: dict[str, int] = {}
        repeats: dict[int, int] = {}
        for index, given in enumerate(self._rows.ids(self.entry.columns["problem_id"])):
            if _present(given) not in (None, "") and (seen := first.setdefault(str(given), index)) != index:
                repeats[index] = seen
        return repeats


def problem_type(name: Any) -> str:
    """The normal spelling: 'multiple choice', 'Multiple-Choice' and 'multiple_choice' are one. Raises UserError for an unknown one."""
    if not isinstance(name, str) or not name:
        raise UserError(f"no problem_type; valid: {', '.join(templates.TYPES)}")
    found = _SPELLINGS.get(re.sub(r"[\s_-]+", "", name.casefold()))
    if found is None:
        raise UserError(f"unknown problem_type '{name}'{nearest(name.casefold(), templates.TYPES)}")
    return found


def _gold(value: Any, column: str) -> str:
    text = _text(value, column)
    match = _ANSWER.search(text)
    gold, around = (match[1].strip(), text[:match.start()] + text[match.end():]) if match else (text.strip(), "")
    if not gold:
        raise UserError(f"record without solution ('{column}' is {'missing' if value is None else 'empty'})")
    if tag := _ANSWER_TAG.search(gold + around):
        raise UserError(f"'{column}' holds a stray {tag[0]}: expected one <answer>..</answer>, or the answer without tags")
    return gold


def _options(value: Any, column: str) -> list[str]:
    if value is None or value == "":
        return []
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"'{column}' must be a list, not {type(value).__name__}")
    for place, option in enumerate(map(_present, value), 1):
        if option is None:
            raise UserError(f"option {place} of '{column}' is missing")
    return [_text(option, f"{column}[{place}]") for place, option in enumerate(value)]


def _present(value: Any) -> Any:
    """The value, None for NaN: what a table holds where a number is missing."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _text(value: Any, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return _whole(str(value), column)
    raise UserError(f"'{column}' must be text, not {type(value).__name__}")


def _whole(text: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"'{column}' holds half a surrogate pair: no encoding can write it") from None
    return text
