"""What each judge and each way of trusting it would have made of the same responses: advantages of a recorded run, recomputed.

    python scripts/judge_offline.py runs/judge_study/sound-paper-score-0 --out benchmarks/results/judge_offline.json

The run's judge must have been a sound one (`judge_study.py --judges sound`): its scores are the truth that the others distort. Nothing is trained, so
that two rows differ by the judge and the trust alone. Of mixed groups (0/1 outcomes), graded ones (OCR, free-form: outcomes in between) and uniform
ones (all outcomes equal): the share of responses whose advantage has the other sign than the outcome says (uniform: than the soundness says).
"""
from __future__ import annotations

import argparse
import json
import math
import random
import sys
from itertools import groupby, product
from pathlib import Path
from statistics import mean
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from judge_study import groups  # noqa: E402
from sophiavl_fast.kernels import trust_advantage  # noqa: E402

from benchmarks import common  # noqa: E402
from sophiavl_fast.data.demo.judge_server import JUDGES  # noqa: E402

KINDS = ("mixed", "graded", "uniform")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="+", help="run folders of a sound judge")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/judge_offline.json")
    parser.add_argument("--alpha", type=float, default=0.3)
    a = parser.parse_args()
    for run in a.run:
        if not (run / "samples.jsonl").is_file():
            parser.error(f"'{run}' is no run's folder (no samples.jsonl)")
    samples = [[json.loads(line) for line in (run / "samples.jsonl").open(encoding="utf-8")] for run in a.run]
    if any(row["thinking"] is None for run in samples for row in run):
        parser.error("a run without a judge's score for every response cannot be judged anew")
    rows = []
    for judge, trust, uniform in product(JUDGES, ("off", "paper"), ("score", "center", "skip")):
        found = [judged(run, judge, trust, uniform, a.alpha) for run in samples]
        rows.append({"judge": judge, "trust": trust, "uniform": uniform} | {key: mean(f[key] for f in found) for key in found[0]})
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in rows[-1].items()}, flush=True)
    common.write(a.out, {"runs": [run.name for run in a.run], "alpha": a.alpha, "rows": rows})


def judged(samples: list[Row], judge: str, trust: str, uniform: str, alpha: float) -> dict[str, float]:
    """Flipped advantages by kind of group, their share of all |advantage|, and gamma where right and wrong meet."""
    steps, luck = max(row["step"] for row in samples), random.Random(0)
    flips: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    size = dict.fromkeys(KINDS, 0.0)
    gammas: list[float] = []
    for step, group in groupby(sorted(groups(samples), key=lambda g: g[0]["step"]), key=lambda g: g[0]["step"]):
        found = list(group)
        flat = [row for g in found for row in g]
        score = [JUDGES[judge](row["thinking"], reasoning(row), luck.random()) for row in flat]
        bounds = [0]
        for g in found:
            bounds.append(bounds[-1] + len(g))
        given = trust_advantage(torch.tensor([row["outcome"] for row in flat]), torch.tensor(score), torch.tensor(bounds, dtype=torch.int32),
                                alpha=alpha, anneal=math.exp(-(step - 1) / steps), mode=trust, uniform=uniform, backend="reference")
        for first, g in zip(bounds, found):
            kind, advantage = kind_of(g), given.advantage[first:first + len(g)].tolist()
            truth = [float(row["sound"]) if kind == "uniform" else row["outcome"] for row in g]
            size[kind] += sum(map(abs, advantage))
            if min(truth) < max(truth):
                flips[kind] += [x * (t - mean(truth)) < 0 for x, t in zip(advantage, truth)]
            if kind != "uniform" and min(truth) < 0.5 <= max(truth):
                gammas.append(given.gamma[first].item())
    total = sum(size.values()) or 1.0
    return {f"flipped_{kind}": mean(flips[kind]) for kind in KINDS} | {f"share_{kind}": size[kind] / total for kind in KINDS} | {
        "gamma_mean": mean(gammas), "gamma_min": min(gammas)}


def reasoning(row: Row) -> str:
    """What a judge is shown of a response."""
    return row["response"].partition("<think>")[2].partition("</think>")[0]


def kind_of(group: list[Row]) -> str:
    outcomes = {row["outcome"] for row in group}
    return "uniform" if len(outcomes) == 1 else "mixed" if outcomes <= {0.0, 1.0} else "graded"


if __name__ == "__main__":
    main()
