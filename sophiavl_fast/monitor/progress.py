"""What the terminal shows while a run works: steps and time left, the current phase, the latest numbers.

On a terminal a live display redraws itself; elsewhere (a log file, CI) one plain line a step.
"""
from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sophiavl_fast.config import Config
from sophiavl_fast.monitor.numbers import clock, compact, sparkline

# (metric, label) in the order of reading; only those that a step reports are shown
SHOWN = (("reward/total", "reward"), ("reward/outcome", "outcome"), ("reward/thinking", "thinking"), ("trust/gamma", "gamma"),
         ("loss", "loss"), ("eval/accuracy", "accuracy"), ("eval/reasoning", "reasoning"))
RATES = (("rollout/tokens_per_s", "rollout"), ("train/tokens_per_s", "train"))


@dataclass(slots=True)
class Timer:
    """What `Progress.phase` hands out: `seconds` is set when the phase ends."""

    seconds: float = 0.0


@dataclass(slots=True)
class Bar:
    """Progress of one long piece of work; total None: not known."""

    description: str
    total: int | None = None
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    def advance(self, count: int = 1) -> None:
        self.done += count

    def set(self, done: int, total: int | None = None) -> None:
        self.done, self.total = done, total or self.total


class Progress:
    """Shows a run of `steps` steps (None: run.steps; 0: work without steps). Silent on every process but torchrun's first."""

    def __init__(self, config: Config, title: str, *, steps: int | None = None, console: Console | None = None):
        self.watch: Callable[[str, int], AbstractContextManager[Any]] = lambda phase, step: nullcontext()
        """Entered around each phase of a step."""
        self.seconds: dict[str, float] = {}
        """Seconds by phase since the last `step`; a phase entered twice adds up."""
        self._title = f"{title}  {config.run.dir}"
        self._total, self._done = config.run.steps if steps is None else steps, 0
        self._lead = os.environ.get("RANK", "0") == "0"
        self._shown = config.monitor.progress
        self._console = console or Console()
        self._phases: list[tuple[str, float]] = []
        self._bars: list[Bar] = []
        self._latest: dict[str, Any] = {}
        self._rewards: deque[float] = deque(maxlen=32)
        self._pace: deque[float] = deque(maxlen=20)
        self._last_seconds: dict[str, float] = {}
        self._step_ended: float | None = None
        self._live: Live | None = None
        if self._lead and self._shown and self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)
            self._live.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[Timer]:
        """Time a phase of the step and show it as the current one. Phases may nest; each counts its whole time."""
        timer = Timer()
        began = time.monotonic()
        self._phases.append((name, began))
        try:
            with self.watch(name, self._done + 1):
                yield timer
        finally:
            self._phases.pop()
            timer.seconds = time.monotonic() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + timer.seconds

    def resume(self, step: int) -> None:
        """An earlier process has done the steps up to this one."""
        self._done = step

    @contextmanager
    def bar(self, description: str, total: int | None = None) -> Iterator[Bar]:
        """A bar for long work beside the steps: data check, engine start, evaluation. Elsewhere than on a terminal, one line at its end."""
        bar = Bar(description, total)
        self._bars.append(bar)
        try:
            yield bar
        finally:
            self._bars.remove(bar)
        if self._live is None:
            self.print(f"{description}{f' {bar.done:,}' if bar.done else ''} in {clock(time.monotonic() - bar.started)}")

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """A step is done: show its numbers, and start the times of the next one."""
        now = time.monotonic()
        if self._step_ended is not None:  # the first step's time holds the engines' start
            self._pace.append(now - self._step_ended)
        self._step_ended, self._last_seconds, self.seconds = now, self.seconds, {}
        self._done = step
        self._latest |= {k: v for k, v in metrics.items() if v is not None}
        if metrics.get("reward/total") is not None:
            self._rewards.append(float(metrics["reward/total"]))
        if self._live is None:
            self.print(self._line(step, metrics))

    def print(self, message: str) -> None:
        """A line above the display."""
        if self._lead and self._shown:
            self._console.print(Text(message), soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _left(self) -> float | None:
        """Seconds to the end at the mean pace of the latest steps."""
        return (self._total - self._done) * sum(self._pace) / len(self._pace) if self._pace else None

    def _line(self, step: int, metrics: dict[str, Any]) -> str:
        parts = [f"step {step}/{self._total}"]
        known = _known(metrics)
        parts += [f"{label} {compact(metrics[key])}" for key, label in SHOWN if key in known]
        parts += [f"{label} {compact(metrics[key])} tokens/s" for key, label in RATES if key in known]
        if self._last_seconds:
            parts.append(_breakdown(self._last_seconds))
        if (left := self._left()) is not None and step < self._total:
            parts.append(f"{clock(left)} left")
        return " · ".join(parts)

    def _render(self) -> RenderableType:
        rows: list[RenderableType] = [self._head() if self._total else Text(self._title, "bold")]
        if self._latest:
            rows += [self._numbers(), Text(f"  last step {_breakdown(self._last_seconds)}" if self._last_seconds else "", "dim")]
        rows += [Text.assemble(("  " * (i + 1), ""), (name, "bold"), f"  {clock(time.monotonic() - began)}") for i, (name, began) in enumerate(self._phases)]
        rows += [_bar_row(bar) for bar in tuple(self._bars)]
        return Group(*rows)

    def _head(self) -> RenderableType:
        left = self._left()
        grid = Table.grid(padding=(0, 2))
        grid.add_row(Text(self._title, "bold"), ProgressBar(total=self._total, completed=self._done, width=36),
                     Text(f"step {self._done}/{self._total}"), Text("" if left is None else f"{clock(left)} left", "cyan"))
        return grid

    def _numbers(self) -> RenderableType:
        text, known = Text("  "), _known(self._latest)
        for key, label in (*SHOWN, *((k, f"{n} tokens/s") for k, n in RATES)):
            if key in known:
                text.append(f"{label} ", "dim").append(f"{compact(known[key])}  ", "bold" if key.startswith("eval/") else "")
            if key == "reward/total" and len(self._rewards) > 1:
                text.append(f"{sparkline(self._rewards)}  ", "cyan")
        return text


def _known(metrics: dict[str, Any]) -> dict[str, Any]:
    """Without None and NaN, which there is nothing to show of."""
    return {key: value for key, value in metrics.items() if value is not None and value == value}


def _breakdown(seconds: dict[str, float]) -> str:
    return f"{sum(seconds.values()):.1f} s ({', '.join(f'{name} {s:.1f}' for name, s in seconds.items())})"


def _bar_row(bar: Bar) -> RenderableType:
    spent = time.monotonic() - bar.started
    share = f"{bar.done:,}/{bar.total:,}" if bar.total else (f"{bar.done:,}" if bar.done else "")
    left = f"{clock(spent * (bar.total - bar.done) / bar.done)} left" if bar.total and bar.done else clock(spent)
    grid = Table.grid(padding=(0, 2))
    line = ProgressBar(total=bar.total, completed=bar.done, pulse=not bar.total, width=28)
    grid.add_row(Text(f"  {bar.description}"), line, Text(share, "dim"), Text(left, "cyan"))
    return grid
