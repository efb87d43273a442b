"""What trust does with judges of known faults: a sweep of short demo runs, each judge a real HTTP server, and pictures of what came out.

    python scripts/judge_study.py --data data/demo --model models/demo --out benchmarks/results/judge_study.json
        --judges sound random inverted length --trust paper off variance --uniform score center skip --anneal exp none --seeds 0 1 2

A cell is judge x trust.mode x uniform_groups x seed x annealing; `--judges none` is plain GRPO. The paper's ablations are cells: without trust is
`--trust off`, without trust and annealing `--trust off --anneal none`, a judge that was never trained is nearest to `--judges random`.
Runs lie under --runs, one at a time; a cell whose run is finished is not run again, so that a sweep can be killed and widened at will.
Settings after `--` go to `train` as they are: `-- run.steps=30`.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import common  # noqa: E402
from sophiavl_fast.data.demo.judge_server import JUDGES, MODEL  # noqa: E402

NONE = "none"     # no judge: plain GRPO
SAMPLES = 3       # scores a response for trust.mode=variance
PARTS = ("judge", "trust", "uniform", "anneal")  # of a cell, the seed aside
LAST_STEPS = 5    # whose sampled responses stand beside the held-out greedy ones


class Cell(NamedTuple):
    """One run of the sweep."""

    judge: str
    trust: str
    uniform: str
    seed: int
    anneal: str = "exp"

    @property
    def name(self) -> str:
        return "-".join(map(str, self[:4])) + (f"-{self.anneal}" if self.anneal != "exp" else "")


def main() -> None:
    a = arguments()
    cells = collected(a.runs) if a.collect else wished(a)
    for number, cell in enumerate(cells, 1):
        began = time.monotonic()
        if not finished(a.runs / cell.name):
            print(f"{number}/{len(cells)} {cell.name}", flush=True)
            run(a, cell)
            print(f"  {time.monotonic() - began:.0f} s", flush=True)
    rows = [measured(a.runs / cell.name, cell) for cell in cells]
    common.write(a.out, {"settings": a.settings, "cells": rows, "summary": summary(rows)})
    draw(a.out.with_suffix(".svg"), rows)
    for line in summary(rows):
        print({k: v if not isinstance(v, list) else [round(x, 3) for x in v] for k, v in line.items()})


def wished(a: argparse.Namespace) -> list[Cell]:
    cells = [Cell(*c) for c in product([j for j in a.judges if j != NONE], a.trust, a.uniform, a.seeds, a.anneal)]
    return cells + [Cell(NONE, "off", "score", seed) for seed in a.seeds if NONE in a.judges]


def collected(runs: Path) -> list[Cell]:
    """The cells whose runs are finished, plain GRPO first, then judge by judge."""
    names = (folder.name.split("-") for folder in sorted(runs.iterdir()))
    cells = [Cell(judge, trust, uniform, int(seed), *rest) for judge, trust, uniform, seed, *rest in names]
    order = (NONE, *JUDGES)
    return sorted((cell for cell in cells if finished(runs / cell.name)), key=lambda cell: (order.index(cell.judge), *cell[1:]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "data/demo")
    parser.add_argument("--model", type=Path, default=ROOT / "models/demo", help="the warm-started policy")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/judge_study")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/judge_study.json")
    parser.add_argument("--judges", nargs="+", choices=(*JUDGES, NONE), default=[*JUDGES, NONE])
    parser.add_argument("--trust", nargs="+", choices=("paper", "off", "variance", "repo"), default=["paper"])
    parser.add_argument("--anneal", nargs="+", choices=("exp", "linear", "none"), default=["exp"])
    parser.add_argument("--uniform", nargs="+", choices=("score", "center", "skip"), default=["score", "skip"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--collect", action="store_true", help="train nothing: report whatever runs are finished")
    parser.add_argument("settings", nargs="*", help="a.b=value for every run")
    found = parser.parse_args()
    if found.collect and not found.runs.is_dir():
        parser.error(f"--runs '{found.runs}' is no folder")
    return found


@contextmanager
def server(data: Path, judge: str) -> Iterator[str]:
    """The URL of the named judge, in its own process."""
    process = subprocess.Popen([sys.executable, "-m", "sophiavl_fast.data.demo.judge_server", "--data", str(data), "--judge", judge], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def run(a: argparse.Namespace, cell: Cell) -> None:
    """Train the cell, then answer the held-out questions greedily by plain transformers."""
    folder = a.runs / cell.name
    settings = [f"data.registry={a.data}/dataset_info.json", f"model.path={a.model}", f"run.dir={folder}", f"run.seed={cell.seed}", "eval.every=0",
                f"trust.mode={cell.trust}", f"trust.uniform_groups={cell.uniform}", f"trust.anneal={cell.anneal}", *a.settings]
    if cell.judge == NONE:
        command(folder, "train", "configs/demo.yaml", *settings, "thinking.backend=off", "algorithm.name=grpo")
    else:
        with server(a.data, cell.judge) as url:
            command(folder, "train", "configs/demo.yaml", *settings, "thinking.backend=endpoint", f"thinking.url={url}", f"thinking.model={MODEL}",
                    "thinking.on_error=fail", f"thinking.samples={SAMPLES if cell.trust == 'variance' else 1}", "thinking.score=parse")
    command(folder, "evaluate", "--engine", "transformers", "--model", str(folder / "hf"), "--data", "demo_eval", "--registry", f"{a.data}/dataset_info.json",
            "--templates", "plain", "--max-new-tokens", "56", "--dtype", "float32", "--out", str(folder / "held_out.json"))


def command(folder: Path, *words: str) -> None:
    """One command of the package, its output in the run's folder. Raises SystemExit with the end of it."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{words[0]}.log"
    with log.open("w") as file:
        code = subprocess.run([sys.executable, "-m", "sophiavl_fast", *words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=os.environ).returncode
    if code:
        raise SystemExit(f"{' '.join(words[:2])} ended with {code}; {log}:\n" + "\n".join(log.read_text().splitlines()[-5:]))


def finished(folder: Path) -> bool:
    return (folder / "held_out.json").is_file()


def measured(folder: Path, cell: Cell) -> dict[str, Any]:
    """Everything the study asks of one run: held-out figures, then gamma and flipped advantages over all its samples."""
    answers = json.loads((folder / "held_out.json").read_text())["answers"]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").open(encoding="utf-8")]
    steps = max(row["step"] for row in samples)
    last = [row for row in samples if row["step"] > steps - LAST_STEPS]
    right = [answer for answer in answers if answer["right"]]
    return cell._asdict() | {
        "steps": steps, "accuracy": share(answers, "right"), "reasoning": share(answers, "sound"),
        "right": len(right), "unsound_of_right": 1 - share(right, "sound"), "length": mean(answer["tokens"] for answer in answers),
        "sampled_unsound_of_right": 1 - share([row for row in last if row["outcome"] >= 1], "sound"),
        **against_formula(samples, cell), **flipped(samples),
    }


def share(rows: list[dict[str, Any]], key: str) -> float:
    return mean(bool(row[key]) for row in rows) if rows else math.nan


def groups(samples: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    found: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for row in samples:
        found[row["step"], row["group"]].append(row)
    return list(found.values())


def against_formula(samples: list[dict[str, Any]], cell: Cell) -> dict[str, Any]:
    """Gamma of the groups with right and wrong answers: its mean, and how far the run's is from exp(min(0, mean of right - mean of wrong))."""
    gaps, gammas = [], []
    for group in groups(samples):
        right, wrong = ([row["thinking"] for row in group if (row["outcome"] >= 0.5) is side] for side in (True, False))
        if cell.judge == NONE or cell.trust != "paper" or not right or not wrong or None in right + wrong:
            continue
        gammas.append(group[0]["gamma"])
        gaps.append(abs(gammas[-1] - math.exp(min(0.0, mean(right) - mean(wrong)))))
    return {"gamma_mixed": mean(gammas) if gammas else None, "gamma_gap_max": max(gaps, default=None), "mixed_groups": len(gammas)}


def flipped(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of responses whose advantage has the wrong sign. Mixed groups: against the outcome's. Uniform ones: against the reasoning's, where it differs."""
    found: dict[str, list[bool]] = {"mixed": [], "uniform": []}
    for group in groups(samples):
        kind = "uniform" if group[0]["uniform"] else "mixed"
        truth = [float(row["sound"]) if kind == "uniform" else row["outcome"] for row in group]
        if min(truth) < max(truth):
            found[kind] += [row["advantage"] * (t - mean(truth)) < 0 for row, t in zip(group, truth, strict=True)]
    size = {kind: sum(abs(row["advantage"]) for row in samples if row["uniform"] is (kind == "uniform")) for kind in found}
    return {f"flipped_{kind}": mean(rows) if rows else None for kind, rows in found.items()} | {"uniform_share": size["uniform"] / (sum(size.values()) or 1)}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, with 95 % intervals where there are several."""
    cells: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cells[tuple(row[part] for part in PARTS)].append(row)
    keys = ("accuracy", "reasoning", "unsound_of_right", "sampled_unsound_of_right", "length", "gamma_mixed", "flipped_mixed", "flipped_uniform",
            "uniform_share")
    return [dict(zip(PARTS, c)) | {"seeds": len(found)} | {k: interval([row[k] for row in found if row[k] is not None]) for k in keys}
            for c, found in cells.items()]


def interval(values: list[float], draws: int = 2000) -> list[float]:
    """Mean, and the bootstrap's 2.5 and 97.5 percentiles over seeds (the mean itself for a single one)."""
    if not values:
        return []
    rng = random.Random(0)
    means = sorted(mean(rng.choices(values, k=len(values))) for _ in range(draws))
    return [mean(values), means[round(0.025 * draws)], means[round(0.975 * draws) - 1]]


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Accuracy, sound reasoning and wrong thinking behind right answers, as SVG: a bar a cell, its interval, a dot a seed."""
    found = summary(rows)
    panels = (("accuracy", "held-out accuracy"), ("reasoning", "sound reasoning"), ("unsound_of_right", "unsound, of right answers"))
    left, wide, tall, gap = 190, 220, 24, 40
    height = 50 + tall * len(found)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + 3 * (wide + gap)}" height="{height}" font-family="sans-serif" font-size="12">',
             '<rect width="100%" height="100%" fill="white"/>']
    for column, (key, title) in enumerate(panels):
        x = left + column * (wide + gap)
        most = max(0.1, *(line[key][2] for line in found), *(row[key] for row in rows))
        parts.append(f'<text x="{x}" y="20" font-weight="bold">{title}</text>')
        for place, line in enumerate(found):
            y, (middle, low, high) = 34 + tall * place, line[key]
            across = [round(x + wide * value / most, 1) for value in (middle, low, high)]
            parts.append(f'<rect x="{x}" y="{y}" width="{across[0] - x:.1f}" height="{tall - 8}" fill="{"#c9c9c9" if line["judge"] == NONE else "#9db8d2"}"/>')
            parts.append(f'<line x1="{across[1]}" x2="{across[2]}" y1="{y + 8}" y2="{y + 8}" stroke="black"/>')
            seeds = [row[key] for row in rows if all(row[part] == line[part] for part in PARTS)]
            parts += [f'<circle cx="{x + wide * value / most:.1f}" cy="{y + 8}" r="2.5"/>' for value in seeds]
            parts.append(f'<text x="{x + wide + 4}" y="{y + 12}" font-size="10">{middle:.3f}</text>')
            if not column:
                words = [line[part] for part in PARTS[:3]] + [f"{line['anneal']} annealing"] * (line["anneal"] != "exp")
                label = "plain GRPO" if line["judge"] == NONE else ", ".join(words)
                parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{label}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
