"""`reward evaluate`: the result as JSON, a calibration picture beside it, and a few lines for people."""
from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sophiavl_fast.errors import UserError
from sophiavl_fast.evaluate.judge.pairs import on_pairs
from sophiavl_fast.evaluate.judge.scores import against_labels
from sophiavl_fast.evaluate.out import refuse_unwritable
from sophiavl_fast.rewards.model.histogram import draw_calibration
from sophiavl_fast.rewards.model.panel import Asking, JudgeSpec, command_words

TRUST = {"spearman": 0.7, "auc among right answers": 0.8, "auc among wrong answers": 0.8}


def evaluate(source: Path, out: Path, judges: Sequence[JudgeSpec], asking: Asking, *, layout: str, open_image: Callable[[str], Any], images: str = "",
             threshold: float = 0.8, mode: str = "auto") -> str:
    """Write `out` and return what to print. Raises UserError: bad input, a judge that cannot be asked."""
    refuse_unwritable(out)
    if not source.is_file():
        raise UserError(f"--input '{source}' does not exist")
    head = {"model": judges[0].model, "url": judges[0].url, "layout": layout, "template": asking.template}
    if layout == "scores":
        found = asyncio.run(against_labels(source, judges[0], asking, open_image=open_image, images=images, threshold=threshold))
        picture = out.with_suffix(".calibration.png")
        draw_calibration(picture, found["calibration"], f"{judges[0].model}: {found['count']:,} traces")
        found |= {"trust": trust(found), "calibration_picture": str(picture)}
        text = summary(found)
    else:
        found = asyncio.run(on_pairs(source, judges[0], asking, mode=mode, open_image=open_image, images=images))
        text = pair_summary(found)
    found["calls"] = asking.budget.calls
    _write(out, json.loads(command_words(json.dumps(head | found, allow_nan=False))))
    return text


def trust(found: dict[str, Any]) -> dict[str, Any]:
    """What is known against each bar; `deserved` is None where the labels cannot tell."""
    known = {"spearman": found["spearman"], "auc among right answers": found["answers_right"]["auc"], "auc among wrong answers": found["answers_wrong"]["auc"]}
    passed = {name: None if value is None else value >= TRUST[name] for name, value in known.items()}
    verdict = None if None in passed.values() else all(passed.values())
    return {"deserved": False if False in passed.values() else verdict, "bars": TRUST, "passed": passed}


def summary(found: dict[str, Any]) -> str:
    """A few lines for a terminal."""
    lines = [
        f"{found['count']:,} traces scored" + (f", {found['unscored']:,} not" if found["unscored"] else ""),
        f"spearman {_n(found['spearman'])} {_range(found['spearman_interval'])}  kendall {_n(found['kendall'])}  mean error {_n(found['mae'])}",
        f"AUC sound against flawed {_n(found['auc'])} {_range(found['auc_interval'])}; among right answers {_n(found['answers_right']['auc'])} "
        f"({found['answers_right']['count']}), among wrong answers {_n(found['answers_wrong']['auc'])} ({found['answers_wrong']['count']})",
        f"length with score {_n(found['length']['score'])}, with label {_n(found['length']['label'])}, with the judge's error {_n(found['length']['excess'])}"]
    lines += [f"  {kind:16} {k['count']:5}  score {_n(k['mean_score'])}  label {_n(k['mean_label'])}  AUC {_n(k['auc_against_sound'])}"
              for kind, k in found["kinds"].items()]
    verdict = {True: "yes", False: "no", None: "not known: the labels do not say which answers are right"}[found["trust"]["deserved"]]
    failed = [f"{name} < {TRUST[name]}" for name, ok in found["trust"]["passed"].items() if ok is False]
    return "\n".join([*lines, f"deserves trust: {verdict}" + (f" ({', '.join(failed)})" if failed else "")])


def pair_summary(found: dict[str, Any]) -> str:
    """A few lines for a terminal."""
    lines = [f"{found['count']:,} pairs ({found['mode']}): right in both orders {_n(found['accuracy'])}, macro {_n(found['macro_accuracy'])}",
             f"as given {_n(found['accuracy_as_given'])}, swapped {_n(found['accuracy_swapped'])}, same choice in both {_n(found['consistent'])}, "
             f"first chosen {_n(found['first_chosen'])}, longer chosen {_n(found['longer_chosen'])} (better {_n(found['longer_better'])}), "
             f"undecided {found['undecided']}"]
    return "\n".join([*lines, *(f"  {name:14} {c['count']:5}  {_n(c['accuracy'])}" for name, c in found["categories"].items())])


def _n(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _range(bounds: list[float] | None) -> str:
    return f"[{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""


def _write(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)
