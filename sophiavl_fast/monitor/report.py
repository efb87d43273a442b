"""report.html: a run on one self-contained page that opens from disk, with no network and nothing beside it.

The page's curves, tables and samples come from the JSON that it embeds; `<script id="metrics">` holds metrics.jsonl line
by line, unchanged. What a model wrote reaches the page as JSON and as text nodes only, and the page's own policy forbids
every script but its own and every address but data: URIs.
"""
from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

import jinja2
import yaml

from sophiavl_fast import __version__
from sophiavl_fast.errors import UserError
from sophiavl_fast.monitor import alarms, browser, groups, jsonl, panels
from sophiavl_fast.monitor.numbers import clock, compact

PAGE = Path(__file__).with_name("page")
RESPONSES = 400  # responses in the sample browser


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html` from the run's own files and return its path.

    Works on a finished, an interrupted or a running run. Raises UserError where there is no run, or no step of it yet, and for a damaged file, naming the line.
    """
    run_dir = Path(run_dir)
    try:
        return _write(run_dir)
    except OSError as error:  # no permission, a folder in a file's place, a full disk
        raise UserError(f"run folder '{run_dir}': '{error.filename or 'report.html'}': {error.strerror}") from None


def _write(run_dir: Path) -> Path:
    metrics = _metrics(run_dir)
    config_text, config = _config(run_dir / "config.yaml")
    threshold = _of(config, "trust.threshold", 0.5)
    samples = run_dir / "samples.jsonl"
    every = groups.index(samples)
    chosen, pictures = groups.spread(every, RESPONSES), browser.Pictures()
    main, more = panels.choose(metrics)
    page = _environment().get_template("report.html").render(
        nonce=secrets.token_urlsafe(16), version=__version__, name=run_dir.resolve().name, config_text=config_text,
        status=_status(metrics, config), facts=_facts(metrics, config), tiles=_tiles(metrics), alarms=alarms.spans(metrics), evaluation=_evaluation(metrics),
        gamma=groups.gamma_view(every, threshold), metrics=metrics, panels=[asdict(p) for p in main], more=[asdict(p) for p in more],
        extremes=panels.extremes(metrics), samples=browser.groups_of(samples, chosen, pictures, threshold), pictures=pictures.found,
        responses=sum(len(g.starts) for g in every), shown=sum(len(g.starts) for g in chosen),
    )
    path = run_dir / "report.html"
    new = path.with_suffix(".html.new")
    new.write_text(page, encoding="utf-8", errors="backslashreplace")
    os.replace(new, path)
    return path


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    if not run_dir.is_dir():
        raise UserError(f"run folder '{run_dir}' does not exist")
    path = run_dir / "metrics.jsonl"
    metrics = jsonl.read(path)
    if not metrics:
        raise UserError(f"run folder '{run_dir}' holds no step yet: metrics.jsonl is {'empty' if path.exists() else 'missing'}")
    for number, record in enumerate(metrics, 1):
        for key, value in record.items():
            if not jsonl.is_number(value):
                raise UserError(f"{path}: line {number}: {key} = {jsonl.shown(value)}: expected a number or null")
    return metrics


def _config(path: Path) -> tuple[str, dict[str, Any]]:
    """config.yaml as text and as a tree, both empty where there is none."""
    if not path.exists():
        return "", {}
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # bytes that are no UTF-8, dates that there are not
        mark = getattr(error, "problem_mark", None)
        where = f"{path}: line {mark.line + 1}" if mark else f"{path}"
        raise UserError(f"{where} is not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a mapping, not {type(config).__name__}")
    for key in ("trust.threshold", "run.steps"):
        if not jsonl.is_number(value := _of(config, key)):
            raise UserError(f"{path}: {key} = {value!r}: expected a number")
    return text, config


def _environment() -> jinja2.Environment:
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"compact": compact, "points": lambda x: f"{100 * x:+.1f}"}
    # tojson escapes <, >, & and ', so that no text can end its script element
    env.policies["json.dumps_function"] = lambda value, **_: json.dumps(value, ensure_ascii=False, allow_nan=False)
    return env


def _of(config: dict[str, Any], key: str, default: Any = None) -> Any:
    """A value of the run's config.yaml, which may be of another version or absent."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return default if node is None else node


def _status(metrics: list[dict[str, Any]], config: dict[str, Any]) -> str:
    last, steps = metrics[-1]["step"], _of(config, "run.steps")
    done = f"{last:,} step{'s' * (last != 1)}"
    if steps is None:
        return done
    return f"{done}, finished" if last >= steps else f"{done} of {steps:,}; unfinished when this page was written"


def _facts(metrics: list[dict[str, Any]], config: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run was, for the page's head; what config.yaml does not say is left out."""
    def say(key: str) -> str:
        value = _of(config, key, "")
        return ", ".join(map(str, value)) if isinstance(value, (dict, list)) else str(value)

    rl = say("recipe") == "rl"
    judge = say("thinking.backend")
    spent = sum(m.get("time/step_s") or 0 for m in metrics)
    rows = [
        ("recipe", f"{say('recipe')} · {say('algorithm.name')}" if rl else say("recipe")), ("model", say("model.path")),
        ("data", say("data.train")), ("held out", say("data.eval")),
        ("batch", f"{say('rollout.prompts_per_step')} prompts × {say('rollout.n')} responses" if rl else f"{say('sft.batch_size')} records" if config else ""),
        ("trust", f"{say('trust.mode')}, alpha {say('trust.alpha')}, anneal {say('trust.anneal')}" if rl and judge != "off" else ""),
        ("judge", f"{judge} · {say('thinking.path') or say('thinking.model')}" if rl and judge != "off" else "off" if rl else ""),
        ("precision", f"{say('model.dtype')} on {say('device')}" if config else ""), ("lr", say("optim.lr")), ("seed", say("run.seed")),
        ("time in steps", clock(spent) if spent else ""),
    ]
    return [(label, value) for label, value in rows if value]


def _tiles(metrics: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The run in a few large numbers; a tile without its metric is left out."""
    tiles = []
    for key, label in (("eval/accuracy", "held-out accuracy"), ("eval/reasoning", "sound reasoning")):
        if (values := _values(metrics, key)) and len(values) > 1:
            tiles.append({"label": label, "before": f"{values[0]:.1%}", "value": f"{values[-1]:.1%}", "note": f"{100 * (values[-1] - values[0]):+.1f} points"})
    for key, label in (("reward/outcome", "outcome reward"), ("reward/thinking", "thinking reward"), ("loss", "loss")):
        if (values := _values(metrics, key)) and len(values) > 1 and len(tiles) < 4:
            ends = min(5, len(values) // 2)
            before, after = compact(fmean(values[:ends])), compact(fmean(values[-ends:]))
            tiles.append({"label": label, "before": before, "value": after, "note": f"mean of {ends} steps each" if ends > 1 else "first and last step"})
    # ahead of the policy tokens are of older weights, and only those sampled right after a transfer say whether the two agree
    ahead = bool(_values(metrics, "rollout/probe_diff_max"))
    for key, label, pick, how, unit in (
        ("rollout/probe_diff_max" if ahead else "rollout/logprob_diff_max", "trainer against engine", max,
         "largest log-prob difference" + " after a transfer" * ahead, ""),
        ("rollout/tokens_per_s", "rollout", median, "tokens/s, median", ""), ("train/tokens_per_s", "training", median, "tokens/s, median", ""),
        ("mem/peak_gib", "host memory", max, "peak, engines included", " GiB"),
    ):
        if values := _values(metrics, key):
            tiles.append({"label": label, "before": "", "value": compact(pick(values)) + unit, "note": how})
    return tiles


def _evaluation(metrics: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Before and after by problem type, from the first and the last evaluation; None where there was none."""
    found = [m for m in metrics if m.get("eval/accuracy") is not None]
    if not found:
        return None
    first, last = found[0], found[-1]
    kinds = sorted({k.removeprefix("eval/accuracy/") for k in last if k.startswith("eval/accuracy/")})
    rows = []
    for kind in ["", *kinds]:
        row: dict[str, Any] = {"kind": kind.replace("_", " ") or "all"}
        for what in ("accuracy", "reasoning"):
            key = f"eval/{what}/{kind}" if kind else f"eval/{what}"
            row[what] = {"before": first.get(key), "after": last.get(key)}
        rows.append(row)
    reasoning = any(r["reasoning"]["after"] is not None for r in rows)
    return {"first": first["step"], "last": last["step"], "count": last.get("eval/count"), "rows": rows, "reasoning": reasoning, "times": len(found)}


def _values(metrics: list[dict[str, Any]], key: str) -> list[float]:
    return [m[key] for m in metrics if m.get(key) is not None]
