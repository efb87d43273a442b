"""The RL recipe end to end on the real engines: megatron-core, vLLM, a judge; every number in samples.jsonl recomputed by hand."""
import json
import math
from collections import defaultdict
from statistics import mean, pvariance, stdev

import pytest

from tests.recipes.conftest import run

KEYS = [
    "step", "loss", "reward/total", "reward/outcome", "reward/thinking", "reward/unscored", "trust/gamma", "trust/weight", "trust/uniform_share",
    "policy/kl_ref", "policy/clip_frac", "policy/entropy", "policy/grad_norm", "rollout/logprob_diff_mean", "rollout/logprob_diff_max",
    "rollout/tokens_per_s", "train/tokens_per_s", "time/rollout_s", "time/reward_s", "time/update_s", "time/transfer_s", "time/step_s", "mem/peak_gib",
]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_formula(outcome, thinking, weight, quorum=1.0):
    """gamma, rewards and advantages of one group, written from the paper's equations (methods 3.4) in plain Python."""
    scored = [t for t in thinking if t is not None]
    if len(scored) < quorum * len(thinking):
        total, gamma = list(outcome), None
    else:
        right = [t for o, t in zip(outcome, thinking) if o >= 0.5]
        wrong = [t for o, t in zip(outcome, thinking) if o < 0.5]
        gamma = math.exp(min(0.0, mean(right) - mean(wrong))) if right and wrong else 1.0
        total = [o + gamma * weight * t for o, t in zip(outcome, thinking)]
    if max(total) == min(total):
        return gamma, total, [0.0] * len(total)
    return gamma, total, [(r - mean(total)) / (stdev(total) + 1e-6) for r in total]


def by_variance(outcome, scores, weight, quorum=1.0):
    """The same for trust.mode: variance (App. E): a gamma of each response from the spread of its own scores."""
    found = [None if None in own else (math.exp(-pvariance(own)), mean(own)) for own in scores]
    terms = [gamma * score for gamma, score in filter(None, found)]
    if not terms or len(terms) < quorum * len(scores):
        gamma, total = [None] * len(scores), list(outcome)
    else:
        gamma = [own and own[0] for own in found]
        total = [o + weight * (own[0] * own[1] if own else mean(terms)) for o, own in zip(outcome, found)]
    if max(total) == min(total):
        return gamma, total, [0.0] * len(total)
    return gamma, total, [(r - mean(total)) / (stdev(total) + 1e-6) for r in total]


def check_samples(rows: list[dict], n: int, steps: float):
    groups = defaultdict(list)
    for row in rows:
        groups[row["step"], row["group"]].append(row)
    for (step, _), group in groups.items():
        assert len(group) == n
        weight = 0.3 * math.exp(-(step - 1) / steps)
        gamma, total, advantage = by_formula([r["outcome"] for r in group], [r["thinking"] for r in group], weight)
        for row, t, a in zip(group, total, advantage):
            assert row["trust_weight"] == pytest.approx(weight, rel=1e-6)
            assert gamma is None or row["gamma"] == pytest.approx(gamma, rel=1e-5)
            assert row["total"] == pytest.approx(t, abs=1e-5)
            assert row["advantage"] == pytest.approx(a, abs=2e-4)
    return groups


@pytest.mark.engine
def test_a_run_from_start_to_report(demo, rl, tmp_path):
    out = tmp_path / "run"
    done = run(*rl(out))
    metrics, rows = lines(out / "metrics.jsonl"), lines(out / "samples.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    for line in metrics[1:]:
        assert not [k for k in KEYS if k not in line], line
        assert line["rollout/logprob_diff_max"] <= 1e-4
        assert all(v is None or math.isfinite(v) for v in line.values())
    assert [m["step"] for m in metrics if "eval/accuracy" in m] == [0, 2, 3]
    groups = check_samples(rows, n=5, steps=3)
    assert len(groups) == 18
    assert any(len({r["outcome"] for r in g}) > 1 for g in groups.values()), "no mixed group: gamma was never exercised"
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"step_2", "step_3"}
    assert (out / "report.html").stat().st_size > 10_000 and (out / "config.yaml").exists()
    assert "accuracy" in done.stdout
    # what plain transformers makes of the export is what the trainer reported
    result = tmp_path / "hf.json"
    run("evaluate", "--engine", "transformers", "--model", str(out / "hf"), "--data", "demo_eval", "--registry", f"{demo}/data/dataset_info.json",
        "--templates", "plain", "--max-new-tokens", "56", "--dtype", "float32", "--limit", "12", "--out", str(result))
    assert json.loads(result.read_text())["eval/accuracy"] == pytest.approx(metrics[-1]["eval/accuracy"])


@pytest.mark.engine
def test_the_server_engine_gives_the_same_run(rl, tmp_path):
    """Same seeds, same tokens, same metrics: inline and server differ in speed only."""
    run(*rl(tmp_path / "inline", "run.steps=2", "eval.every=0"))
    run(*rl(tmp_path / "server", "run.steps=2", "eval.every=0", "rollout.engine=server"))
    a, b = lines(tmp_path / "inline" / "samples.jsonl"), lines(tmp_path / "server" / "samples.jsonl")
    assert [r["response"] for r in a if r["step"] == 1] == [r["response"] for r in b if r["step"] == 1]
    assert [r["response"] for r in a] == [r["response"] for r in b]


@pytest.mark.engine
def test_plain_grpo_has_no_thinking_term(rl, tmp_path):
    run(*rl(tmp_path / "run", "run.steps=1", "eval.every=0", "thinking.backend=off"))
    for row in lines(tmp_path / "run" / "samples.jsonl"):
        assert row["thinking"] is None and row["total"] == row["outcome"]


@pytest.mark.engine
def test_mini_batches_and_epochs(rl, tmp_path):
    run(*rl(tmp_path / "run", "run.steps=1", "eval.every=0", "algorithm.mini_batches=3", "algorithm.epochs=2"))
    line = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert line["policy/kl_ref"] >= 0 and math.isfinite(line["loss"])
