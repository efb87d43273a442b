"""Rows of samples.jsonl and the lengths of a step's responses."""
from __future__ import annotations

import math
from typing import Any

from sophiavl_fast.evaluate import accuracy
from sophiavl_fast.types import Group, Scores


def rows(groups: list[Group], scores: Scores, weighted: Any, metrics: dict[str, float], step: int) -> list[dict[str, Any]]:
    """One row a response: what it was asked, what it said, every reward, gamma and advantage. NaN is written as null."""
    out, row = [], 0
    for index, group in enumerate(groups):
        first = row
        outcomes = scores.outcome[first:first + len(group.responses)].tolist()
        for response, outcome in zip(group.responses, outcomes, strict=True):
            thinking = None if scores.thinking is None else scores.thinking[row].mean().item()
            out.append({
                "id": group.prompt.id, "step": step, "group": index, "prompt": group.prompt.question, "images": group.prompt.image_paths,
                "gold": group.prompt.gold, "problem_type": group.prompt.problem_type, "response": response.text,
                "prompt_tokens": len(group.prompt.expanded_ids), "response_tokens": len(response.token_ids), "finish_reason": response.finish_reason,
                "outcome": outcome, "format_ok": bool(scores.format_ok[row]),
                "thinking": None if thinking is None or math.isnan(thinking) else thinking,
                "total": weighted.reward[row].item(), "gamma": _finite(weighted.gamma[row].item()), "thinking_used": bool(weighted.used[row]),
                "trust_weight": metrics["trust/weight"], "advantage": weighted.advantage[row].item(),
                "uniform": min(outcomes) == max(outcomes), "sound": accuracy.sound(group.prompt, response.text),
                "seed": response.seed, "weight_version": response.weight_versions[-1] if response.weight_versions else None,
                "unscored_because": scores.reasons.get(row),
            })
            row += 1
    return out


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def length_metrics(groups: list[Group]) -> dict[str, float]:
    """Mean, longest and truncated responses of a step."""
    lengths = [len(r.token_ids) for g in groups for r in g.responses]
    cut = sum(r.finish_reason == "length" for g in groups for r in g.responses)
    return {"response/length_mean": sum(lengths) / len(lengths), "response/length_max": max(lengths), "response/truncated": cut / len(lengths)}
