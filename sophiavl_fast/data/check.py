"""What a dataset holds, and every record of it that cannot be used: before training, and for `data check NAME`."""
from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sophiavl_fast import model_folder
from sophiavl_fast.config import Data, Rollout
from sophiavl_fast.data import images
from sophiavl_fast.data.dataset import BadRecord, Dataset, Example
from sophiavl_fast.data.limits import Limits
from sophiavl_fast.data.processor import Processor
from sophiavl_fast.errors import UserError
from sophiavl_fast.types import MAX_IMAGES

SAMPLE = 256
"""Records that data.check: sample reads of each dataset, evenly spaced."""

_CHUNK = 64            # records a thread takes at once
_REPORT_EVERY_S = 15.0


@dataclass(slots=True, kw_only=True)
class Summary:
    """One dataset's check. `bad`: "file:line: reason" of each record that cannot be used, in order; `tokens` is empty without a processor."""

    name: str
    records: int
    checked: int = 0
    bad: list[str] = field(default_factory=list)
    types: Counter[str] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)          # images a record -> records
    tokens: list[int] = field(default_factory=list)                # prompt tokens a record, image tokens included
    sizes: list[tuple[int, int]] = field(default_factory=list)     # (height, width) an image
    seconds: float = 0.0


@dataclass(slots=True)
class _Finding:
    bad: str = ""
    type: str = ""
    tokens: int | None = None
    sizes: list[tuple[int, int]] = field(default_factory=list)


def check_dataset(dataset: Dataset, processor: Processor | None = None, *, max_tokens: int | None = None, sample: int | None = None,
                  workers: int = 2, on_progress: Callable[[int, int], None] | None = None) -> Summary:
    """Read every record and image of `dataset`, or `sample` evenly spaced ones, in threads; prompt tokens are counted with a processor.

    `on_progress` is told (records done, records to do).
    """
    count = min(len(dataset), sample or len(dataset))
    out, started = Summary(name=dataset.name, records=len(dataset), checked=count), time.perf_counter()
    rows = [i * len(dataset) // count for i in range(count)]
    chunks = [rows[i:i + _CHUNK] for i in range(0, count, _CHUNK)]
    with ThreadPoolExecutor(workers) as pool:
        done = 0
        for findings in pool.map(lambda chunk: [_look(dataset, i, processor, max_tokens) for i in chunk], chunks):
            for found in findings:
                _count(out, found)
            done += len(findings)
            if on_progress:
                on_progress(done, count)
    out.seconds = time.perf_counter() - started
    return out


def _count(out: Summary, found: _Finding) -> None:
    if found.bad:
        out.bad.append(found.bad)
        return
    out.types[found.type] += 1
    out.images[len(found.sizes)] += 1
    out.sizes += found.sizes
    out.tokens += [] if found.tokens is None else [found.tokens]


def _look(dataset: Dataset, index: int, processor: Processor | None, max_tokens: int | None) -> _Finding:
    try:
        example = dataset.example(index)
        try:
            sizes = [images.size(i) for i in example.images]
            tokens = dataset.length(example, processor, max_tokens, sizes=sizes) if processor else None
            for image in example.images:
                images.verify(image)
        except UserError as error:
            raise BadRecord(f"{example.where}: {error}") from None
    except BadRecord as error:
        return _Finding(bad=str(error))
    return _Finding(type=example.problem_type, tokens=tokens, sizes=sizes)


def check_before_training(datasets: Sequence[Dataset], processor: Processor, config: Data) -> list[Summary]:
    """Check the training sets by data.check. Raises BadRecord for the first bad one where data.on_error is refuse, else warns of how many."""
    sample = SAMPLE if config.check == "sample" else None
    found = [check_dataset(d, processor, max_tokens=config.max_prompt_tokens, sample=sample, workers=config.workers, on_progress=_lines(d.name))
             for d in datasets]
    for summary in found:
        if summary.bad and config.on_error == "refuse":
            more = f" (and {len(summary.bad) - 1} more: `data check {summary.name}` lists them)" if len(summary.bad) > 1 else ""
            raise BadRecord(f"{summary.bad[0]}{more}")
        if summary.bad:
            logging.getLogger(__name__).warning("%s: %d of %d records cannot be used and are replaced when met; the first: %s",
                                                summary.name, len(summary.bad), summary.checked, summary.bad[0])
    return found


def _lines(name: str) -> Callable[[int, int], None]:
    """Plain progress lines on stderr, one every few seconds: the trainer's own display may hold the terminal."""
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _REPORT_EVERY_S:
            last = time.monotonic()
            print(f"data check {name}: {done:,} of {total:,} records", file=sys.stderr, flush=True)

    return report


def print_summary(summary: Summary, console: Console | None = None, *, counted: bool = True) -> None:
    """Counts, types, token lengths, image sizes, and every bad record with its file and line."""
    console = console or Console()
    table = Table(title=summary.name, show_header=False)
    table.add_row("records", f"{summary.records} ({summary.checked} checked in {summary.seconds:.1f} s, {len(summary.bad)} bad)")
    table.add_row("types", ", ".join(f"{kind} {n}" for kind, n in summary.types.most_common()) or "-")
    table.add_row("images a record", ", ".join(f"{n}: {records}" for n, records in sorted(summary.images.items())) or "-")
    table.add_row("prompt tokens", _percentiles(summary.tokens) if summary.tokens else "-" if counted else "not counted: name a model folder with --model")
    if summary.sizes:
        height, width = zip(*summary.sizes, strict=True)
        table.add_row("image height", _percentiles(height))
        table.add_row("image width", _percentiles(width))
        table.add_row("image megapixels", _percentiles([h * w / 1e6 for h, w in summary.sizes], ".2f"))
    console.print(table)
    for line in summary.bad:
        console.print(line.encode(errors="backslashreplace").decode(), style="red", markup=False, highlight=False, soft_wrap=True)


def _percentiles(values: Sequence[float], form: str = ".0f") -> str:
    names = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    return ", ".join(f"{name} {value:{form}}" for name, value in zip(names, np.percentile(values, list(names.values())), strict=True))


def command(name: str, *, registry: str | Path = "", model: str = "", templates: str = "sophia", min_pixels: int | None = None,
            max_pixels: int | None = None, max_prompt_tokens: int | None = None, max_new_tokens: int | None = None,
            check: Callable[[Example], None] | None = None) -> int:
    """`data check NAME`: print the summary; the exit code is 2 where a record is bad, or more than an RL run with these lengths takes.

    check: what a run asks of each record beside, raises UserError.
    Raises UserError: no such dataset or model, limits without a model or the wrong way round.
    """
    if not model and any(n is not None for n in (min_pixels, max_pixels, max_prompt_tokens, max_new_tokens)):
        raise UserError("--min-pixels, --max-pixels, --max-prompt-tokens and --max-new-tokens are about tokens, which are counted with --model only: "
                        "name the model's folder")
    if min_pixels is not None and max_pixels is not None and min_pixels > max_pixels:
        raise UserError(f"--min-pixels {min_pixels} is more than --max-pixels {max_pixels}")
    limits = Limits(images=MAX_IMAGES, check=check)
    if model:
        limits = Limits(images=MAX_IMAGES, sequence=model_folder.longest(model), new_tokens=max_new_tokens or Rollout().max_new_tokens,
                        advice="the model itself (max_position_embeddings; or lower --max-new-tokens)", check=check)
    dataset = Dataset.open(name, registry, template=templates, limits=limits)
    processor = Processor(model, min_pixels=min_pixels, max_pixels=max_pixels) if model else None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=len(dataset))
        summary = check_dataset(dataset, processor, max_tokens=max_prompt_tokens or Data().max_prompt_tokens,
                                on_progress=lambda done, total: bar.update(task, completed=done, total=total))
    print_summary(summary, counted=bool(model))
    dataset.close()
    return 2 if summary.bad else 0
