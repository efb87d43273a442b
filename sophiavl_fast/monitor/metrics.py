"""A run's two logs: metrics.jsonl (one object a step) and samples.jsonl (one object a response)."""
from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from sophiavl_fast.config import Config
from sophiavl_fast.monitor import alarms, jsonl
from sophiavl_fast.monitor.loggers import open_loggers


class RunLog:
    """Writes the run's metrics and samples; one rank of the run holds it.

    Step 0 is the evaluation before any update, step k the k-th update: both files count that way. Write a step's
    metrics before its checkpoint, so that a checkpoint never stands without its line.
    """

    def __init__(self, run_dir: str | Path, config: Config, resume_step: int | None):
        """Open the logs. `resume_step` k keeps what was written up to checkpoint k and cuts the rest; None starts both files anew.

        Raises UserError for a log that is damaged before its last line, or for a logger that is not installed.
        """
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._loggers = open_loggers(self.run_dir, config, resume_step)
        last_step = -1 if resume_step is None else resume_step
        self._metrics, self._metrics_step = _reopen(self.run_dir / "metrics.jsonl", last_step)
        self._samples, self._samples_step = _reopen(self.run_dir / "samples.jsonl", last_step)
        self._keep_samples = config.monitor.samples
        self._recent = deque(jsonl.read(self.run_dir / "metrics.jsonl"), maxlen=2 * alarms.WINDOW)
        self._sounding = alarms.sounding(self._recent)

    def metrics(self, step: int, values: dict[str, Any]) -> list[str]:
        """Write one step: numbers keyed by metric name. NaN and infinities become null, integers stay integers.

        Steps with a reward get the metrics `alarm/NAME`, 0 or 1; returns a line for every alarm that begins with this step.
        Raises ValueError when the step is not beyond the last one: no step is ever written twice.
        """
        if step <= self._metrics_step:
            raise ValueError(f"metrics of step {step} after those of step {self._metrics_step}")
        record = {"step": step, **jsonl.plain(values)}
        began: list[str] = []
        if record.get("reward/total") is not None:
            self._recent.append(record)
            sounds, before = alarms.sounding(self._recent), self._sounding
            began, self._sounding = [f"alarm ({name}): {line}" for name, line in sounds.items() if name not in before], sounds
            record |= {f"alarm/{name}": int(name in sounds) for name in alarms.ALARMS}
        _append(self._metrics, [record])
        self._metrics_step = step
        numbers = {k: v for k, v in record.items() if k != "step" and isinstance(v, (int, float))}
        for logger in self._loggers:
            logger.log(step, numbers)
        return began

    def samples(self, records: Iterable[dict[str, Any]]) -> None:
        """Append responses, each with its `step`, in the order of the steps; nothing where monitor.samples is off."""
        if not self._keep_samples:
            return
        records = list(records)
        for record in records:
            if record["step"] < self._samples_step:
                raise ValueError(f"a sample of step {record['step']} after those of step {self._samples_step}")
            self._samples_step = record["step"]
        _append(self._samples, records)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()
        for logger in self._loggers:
            logger.close()


def _reopen(path: Path, last_step: int) -> tuple[TextIOWrapper, int]:
    """The file, cut back and open for appending, and the last step in it (-1: none)."""
    kept = jsonl.cut(path, last_step)
    # a lone surrogate in a response becomes its JSON escape
    return path.open("a", encoding="utf-8", errors="backslashreplace"), -1 if kept is None else kept


def _append(file: TextIOWrapper, records: list[dict[str, Any]]) -> None:
    file.write("".join(map(jsonl.line, records)))
    file.flush()
