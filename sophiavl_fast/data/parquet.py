"""Rows of parquet files, by index.

A shuffled reader asks for single rows, and parquet decodes a row group at a time. Small sets are therefore held as an
Arrow table; large ones are unpacked once into an Arrow file in the cache folder and memory-mapped from there.
"""
from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sophiavl_fast.errors import UserError, nearest

IN_MEMORY_BYTES = 512 * 2**20
_ROWS_A_BATCH = 64


class ParquetRows:
    """Rows of one file, or of a folder's files of one split: `train-00000-of-00002.parquet`, `train/x.parquet` or `train.parquet`."""

    def __init__(self, path: Path, split: str = "train") -> None:
        self.files = _files(path, split)
        try:
            sizes = [pq.read_metadata(f) for f in self.files]
            self._starts = [0, *accumulate(m.num_rows for m in sizes)]
            unpacked = sum(m.row_group(g).total_byte_size for m in sizes for g in range(m.num_row_groups))
            self._table = pa.concat_tables([pq.read_table(f) for f in self.files]) if unpacked <= IN_MEMORY_BYTES else _mapped(self.files)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"data file '{path}' cannot be read as parquet: {' '.join(str(error).split())}") from None

    def __len__(self) -> int:
        return self._table.num_rows

    def row(self, index: int) -> dict[str, Any]:
        return self._table.slice(index, 1).to_pylist()[0]

    def where(self, index: int) -> str:
        file = bisect_right(self._starts, index) - 1
        return f"{self.files[file]}[{index - self._starts[file]}]"

    def ids(self, column: str) -> list[Any]:
        return self._table[column].to_pylist() if column in self._table.column_names else [None] * len(self)

    def close(self) -> None:
        self._table = self._table.slice(0, 0)


def _files(path: Path, split: str) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(path.rglob("*.parquet"))
    if not found:
        raise UserError(f"data folder '{path}' holds no parquet file")
    splits = {f: f.parent.name if f.parent not in (path, path / "data") else f.stem.split("-")[0] for f in found}
    chosen = [f for f in found if splits[f] == split]
    if not chosen:
        raise UserError(f"data folder '{path}' has no split '{split}'{nearest(split, set(splits.values()))}")
    return chosen


def _mapped(files: list[Path]) -> pa.Table:
    """The files as one memory-mapped Arrow table, unpacked once; keyed by their paths, sizes and times."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sophiavl_fast"
    key = hashlib.blake2b(repr([(str(f), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]).encode(), digest_size=12).hexdigest()
    target = cache / f"{key}.arrow"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, pq.read_schema(files[0])) as out:
            for file in files:
                for batch in pq.ParquetFile(file).iter_batches(batch_size=_ROWS_A_BATCH):
                    out.write_batch(batch)
        partial.rename(target)
    return pa.ipc.open_file(pa.memory_map(str(target))).read_all()
