"""Rows of samples.jsonl and the lengths of a step's responses."""
from __future__ import annotations

import math
from typing import Any

from sophiavl_fast.evaluate import accuracy
from sophiavl_fast.types import Group, Scores


def rows(groups: list[Group], scores: Scores, weighted: Any, mine: slice, trust_weight: float, step: int, first_group: int = 0) -> list[dict[str, Any]]:
    """One row a response: what it was asked, what it said, every reward, gamma and advantage. NaN is written as null.

    `thinking` is the mean where a response has several scores, which `thinking_scores` then lists (trust.mode: variance weighs by their spread).
    `weighted` is the Trust of the whole step, `mine` the rows of it that belong to these groups and scores;
    `first_group` is the number of the first group within the step.
    """
    out, row = [], 0
    total, gamma, used, advantage = (x[mine].tolist() for x in (weighted.reward, weighted.gamma, weighted.used, weighted.advantage))
    for index, group in enumerate(groups, first_group):
        outcomes = scores.outcome[row:row + len(group.responses)].tolist()
        for response, outcome in zip(group.responses, outcomes, strict=True):
            each = [] if scores.thinking is None else scores.thinking[row].reshape(-1).tolist()
            thinking = None if scores.thinking is None else scores.thinking[row].mean().item()
            out.append({
                "id": group.prompt.id, "step": step, "group": index, "prompt": group.prompt.question, "images": group.prompt.image_paths,
                "gold": group.prompt.gold, "problem_type": group.prompt.problem_type, "response": response.text,
                "prompt_tokens": len(group.prompt.expanded_ids), "response_tokens": len(response.token_ids), "finish_reason": response.finish_reason,
                "outcome": outcome, "overlong": None if scores.overlong is None else scores.overlong[row].item(), "format_ok": bool(scores.format_ok[row]),
                "thinking": None if thinking is None or math.isnan(thinking) else thinking,
                **({"thinking_scores": [_finite(score) for score in each]} if len(each) > 1 else {}),
                "total": total[row], "gamma": _finite(gamma[row]), "thinking_used": used[row], "trust_weight": trust_weight, "advantage": advantage[row],
                "uniform": min(outcomes) == max(outcomes), "sound": accuracy.sound(group.prompt, response.text),
                "seed": response.seed, "weight_version": response.weight_versions[-1] if response.weight_versions else None,
                "unscored_because": scores.reasons.get(row),
            })
            row += 1
    return out


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def length_metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Tokens of a step's responses in all, their mean and longest, and the share that was cut."""
    lengths = [row["response_tokens"] for row in rows]
    cut = sum(row["finish_reason"] == "length" for row in rows)
    return {"response/tokens": sum(lengths), "response/length_mean": sum(lengths) / len(lengths), "response/length_max": max(lengths),
            "response/truncated": cut / len(lengths)}
