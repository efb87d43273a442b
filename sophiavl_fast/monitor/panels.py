"""Which curves the report draws, in the order of reading: what was learned, how trust acted, how the update went, what it cost."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: its series as (metric, label), drawn as lines, as points joined by lines (rare values) or as a stack."""

    title: str
    series: tuple[tuple[str, str], ...]
    note: str = ""
    kind: Literal["line", "points", "stack"] = "line"
    unit: str = ""
    log: bool = False
    unit_interval: bool = False
    """The values are shares: the axis is [0, 1]."""
    needs: str = ""
    """Drawn only where this metric is there."""


PANELS = (
    Panel("Held-out answers", (("eval/accuracy", "accuracy"), ("eval/reasoning", "sound reasoning")), "greedy, share of questions", kind="points",
          unit_interval=True),
    Panel("Reward", (("reward/total", "total"), ("reward/outcome", "outcome"), ("reward/thinking", "thinking")), "mean over the step's responses"),
    Panel("Loss", (("loss", "loss"),)),
    Panel("Trust", (("trust/gamma", "gamma"), ("trust/weight", "weight")), "gamma dims a doubtful judge; weight is alpha times annealing", unit_interval=True),
    Panel("Judge against outcome", (("trust/rank_corr", "rank correlation"),), "Spearman, over the step's scored responses"),
    Panel("Uniform and unscored", (("trust/uniform_share", "uniform share"), ("reward/unscored", "unscored")),
          "share of |advantage| from groups whose outcomes are all equal; share of thinking scores missing", unit_interval=True),
    Panel("Response length", (("response/length_mean", "mean"), ("response/length_max", "longest")), unit="tokens"),
    Panel("Truncated responses", (("response/truncated", "truncated"),), "share cut at the token limit"),
    Panel("KL to the reference", (("policy/kl_ref", "KL"),)),
    Panel("Entropy", (("policy/entropy", "entropy"),), unit="nats a token"),
    Panel("Clipped ratios", (("policy/clip_frac", "clipped"),), "share of tokens"),
    Panel("Gradient norm", (("policy/grad_norm", "norm"),), "before clipping"),
    Panel("Trainer against engine", (("rollout/logprob_diff_max", "max"), ("rollout/logprob_diff_mean", "mean"),
                                    ("rollout/probe_diff_max", "max after a transfer")), "difference of the sampled tokens' log-probs", log=True),
    Panel("Time by phase", (("time/rollout_s", "rollout"), ("time/reward_s", "reward"), ("time/update_s", "update"), ("time/transfer_s", "transfer"),
                               ("time/probe_s", "probe"), ("time/sleep_s", "engines to sleep")), kind="stack", unit="s a step"),
    Panel("Sampling beside the update", (("time/step_s", "whole step"), ("rollout/busy_s", "sampling"), ("time/update_s", "update")),
          "a step takes as long as the longer of the two where they overlap", unit="s", needs="rollout/busy_s"),
    Panel("Throughput", (("rollout/tokens_per_s", "rollout"), ("train/tokens_per_s", "training")), unit="tokens/s"),
    Panel("Memory", (("mem/peak_gib", "host peak"), ("mem/host_gib", "host"), ("mem/gpu_peak_gib", "GPU peak")), unit="GiB"),
    Panel("Learning rate", (("optim/lr", "lr"),)),
)


def choose(metrics: list[dict[str, Any]]) -> tuple[list[Panel], list[Panel]]:
    """The panels that have something to show, and one for each number that none of them holds."""
    present = {key for record in metrics for key, value in record.items() if _is_number(value) and not key.startswith("alarm/")} - {"step"}
    main = [replace(p, series=kept) for p in PANELS if (not p.needs or p.needs in present) and (kept := tuple(s for s in p.series if s[0] in present))]
    drawn = {key for panel in main for key, _ in panel.series}
    rare = {key for key in present if key.startswith("eval/")}
    return main, [Panel(key, ((key, key.rpartition("/")[2]),), kind="points" if key in rare else "line") for key in sorted(present - drawn)]


def extremes(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every metric's first and last value, minimum and maximum, for the table of all numbers."""
    found: dict[str, list[float]] = {}
    for record in metrics:
        for key, value in record.items():
            if key != "step" and _is_number(value):
                found.setdefault(key, []).append(value)
    return [{"key": k, "first": v[0], "last": v[-1], "min": min(v), "max": max(v), "count": len(v)} for k, v in sorted(found.items())]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
