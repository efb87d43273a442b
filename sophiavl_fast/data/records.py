"""Rows on disk: JSON list, JSONL or parquet, each read by index, each with its place (file and line) for messages.

Opening costs one pass over the ids; rows are decoded when asked for, so that 130,000 records cost seconds and little memory.
"""
from __future__ import annotations

import json
import os
from array import array
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from sophiavl_fast.errors import UserError, nearest


class Rows(Protocol):
    """Rows of one dataset. `row` raises UserError for one that cannot be parsed; `where` is its file and line (or index)."""

    def __len__(self) -> int: ...
    def row(self, index: int) -> dict[str, Any]: ...
    def where(self, index: int) -> str: ...
    def ids(self, column: str) -> list[Any]: ...
    def close(self) -> None: ...


def open_rows(path: Path, split: str = "", missing: str = "") -> Rows:
    """Rows of a .json, .jsonl or .parquet file, or of a folder of parquet files, where `split` chooses ("": train). Raises UserError.

    missing: what to say beside the name of a file that does not exist.
    """
    if not _sayable(str(path)):
        raise UserError(f"data file {str(path)!r}: no file can have this name")
    try:
        path.stat()
        return _open(path, split)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"data file '{path}' does not exist{nearest(str(path), _beside(path))}{missing}") from None
    except OSError as error:
        raise UserError(f"data file '{path}' cannot be read: {error.strerror or error}") from None


def _sayable(path: str) -> bool:
    """Whether the file system takes the name: no null character, no half of a surrogate pair."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _open(path: Path, split: str) -> Rows:
    if split and not path.is_dir():
        raise UserError(f"split '@{split}': data file '{path}' is not a folder of parquet files")
    if path.is_dir() or path.suffix == ".parquet":
        from sophiavl_fast.data.parquet import ParquetRows

        return ParquetRows(path, split or "train")
    if path.suffix == ".jsonl":
        return JsonlRows(path)
    if path.suffix == ".json":
        return JsonRows(path)
    raise UserError(f"data file '{path}': expected .json, .jsonl, .parquet or a folder of parquet files")


def _beside(path: Path) -> list[str]:
    """Data files in the nearest folder that exists, two levels deep: a download seldom lies exactly where a registry says."""
    folder = path.parent if os.path.isdir(path.parent) else path.parent.parent
    found = (p for pattern in ("*", "*/*") for p in islice(folder.glob(pattern), 10_000))
    return sorted(str(p) for p in found if p.suffix in (".json", ".jsonl", ".parquet") and p.name != "dataset_info.json")[:8]


class JsonlRows:
    """One JSON object a line; only the lines' offsets are held. Reads are positional, so threads share the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets, self._lines = array("q"), array("q")
        self._file = os.open(path, os.O_RDONLY)
        place = 0
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    self._offsets.append(place)
                    self._lines.append(number)
                place += len(line)
        self._offsets.append(place)

    def __len__(self) -> int:
        return len(self._lines)

    def row(self, index: int) -> dict[str, Any]:
        first, after = self._offsets[index], self._offsets[index + 1]
        try:
            return _object(json.loads(os.pread(self._file, after - first, first)))
        except (ValueError, RecursionError) as error:
            raise UserError(f"not JSON: {error}") from None

    def where(self, index: int) -> str:
        return f"{self.path}:{self._lines[index]}"

    def ids(self, column: str) -> list[Any]:
        return [_quiet(self, i).get(column) for i in range(len(self))]

    def close(self) -> None:
        os.close(self._file)


class JsonRows:
    """A JSON list of objects, held as read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            rows = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            hint = "; name it .jsonl if it holds one object a line" if "Extra data" in str(error) else ""
            raise UserError(f"data file '{path}' is not JSON: {error}{hint}") from None
        if not isinstance(rows, list):
            raise UserError(f"data file '{path}' must hold a list of records, not {type(rows).__name__}")
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, Any]:
        return _object(self._rows[index])

    def where(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def ids(self, column: str) -> list[Any]:
        return [_quiet(self, i).get(column) for i in range(len(self))]

    def close(self) -> None:
        self._rows = []


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"expected a record, not {type(value).__name__}")
    return value


def _quiet(rows: Rows, index: int) -> dict[str, Any]:
    """The row, or an empty one where it is unreadable: whoever asks for the row itself gets the error."""
    try:
        return rows.row(index)
    except UserError:
        return {}
