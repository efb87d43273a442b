"""A step's groups judged over all replicas; and dynamic sampling (DAPO, arXiv 2503.14476, sec. 3.2): groups without signal give way to fresh prompts.

A group whose advantages are all 0 moves nothing. Up to rollout.resample times those of a step are replaced, each in its place, by the
next prompts of the stream, on whichever replica they lie; what is then still without signal stays.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sophiavl_fast.algorithms import trust
from sophiavl_fast.kernels import Trust
from sophiavl_fast.recipes import ranks
from sophiavl_fast.recipes.rooms import Rooms
from sophiavl_fast.types import Group, Scores


@dataclass(slots=True)
class Judged:
    """This replica's groups and scores; the whole step's scores, advantages and metrics."""

    groups: list[Group]
    scores: Scores
    everyone: ranks.Step
    weighted: Trust
    metrics: dict[str, float]

    def silent(self) -> list[bool]:
        """Of every group of the step, in the replicas' order: whether all its advantages are 0."""
        return [not bool(part.any()) for part in self.weighted.advantage.split(self.everyone.sizes)]


def judged(rooms: Rooms, groups: list[Group], scores: Scores, step: int) -> Judged:
    """Statistics and metrics are over the whole step, whichever replica drew a group. Leads only."""
    everyone = ranks.joined(rooms.policy.gather_replicas((scores, [len(g.responses) for g in groups], rooms.drawn(step)["skipped"])))
    weighted, found = trust.advantages(everyone.scores, everyone.sizes, step - 1, rooms.config)
    return Judged(groups, scores, everyone, weighted, found)


def resampled(rooms: Rooms, seen: Judged, step: int) -> tuple[Judged, float, float]:
    """The step with its silent groups replaced, metrics of that included, and the seconds of sampling and of scoring it took. Leads only.

    rollout/resampled: groups that were replaced; rollout/silent: those left without signal; rollout/outcome: mean outcome of all that
    was sampled, since reward/outcome is then that of a choice.
    """
    policy, phase, rewards = rooms.policy, rooms.progress.phase, rooms.rewards
    assert rewards is not None
    sampled, scored, replaced, outcomes = 0.0, 0.0, 0, [seen.everyone.scores.outcome]
    for turn in range(1, rooms.config.rollout.resample + 1):
        silent = seen.silent()
        if not any(silent):
            break
        share = len(silent) // policy.replicas
        mine = silent[policy.replica * share:(policy.replica + 1) * share]
        with phase("rollout") as rollout:
            prompts = rooms.loader.fresh([sum(silent[r * share:(r + 1) * share]) for r in range(policy.replicas)], replica=policy.replica)
            fresh = rooms.generate(prompts, step, rewards.start, turn) if prompts else []
        with phase("reward") as reward:
            groups, scores = replaced_in(seen.groups, seen.scores, mine, fresh, rewards.score(fresh) if fresh else None)
            seen = judged(rooms, groups, scores, step)
        parts = seen.everyone.scores.outcome.split(seen.everyone.sizes)
        outcomes += [part for part, was in zip(parts, silent, strict=True) if was]
        sampled, scored, replaced = sampled + rollout.seconds, scored + reward.seconds, replaced + sum(silent)
    seen.metrics |= {"rollout/resampled": replaced, "rollout/silent": sum(seen.silent()), "rollout/outcome": torch.cat(outcomes).mean().item()}
    return seen, sampled, scored


def replaced_in(groups: list[Group], scores: Scores, silent: list[bool], fresh: list[Group], theirs: Scores | None) -> tuple[list[Group], Scores]:
    """Groups and scores in which each silent group has given its place to the next of `fresh`, whose scores are `theirs`."""
    if theirs is None:
        return groups, scores
    old, new = _by_group(groups, scores), iter(zip(fresh, _by_group(fresh, theirs), strict=True))
    chosen = [next(new) if was else (group, part) for group, part, was in zip(groups, old, silent, strict=True)]
    merged = ranks.joined([(part, [], 0) for _, part in chosen]).scores
    return [group for group, _ in chosen], replace(merged, killed=scores.killed + theirs.killed, seconds=scores.seconds + theirs.seconds)


def _by_group(groups: list[Group], scores: Scores) -> list[Scores]:
    """The scores cut at the groups."""
    found, row = [], 0
    for group in groups:
        rows = slice(row, row + len(group.responses))
        cut = [None if x is None else x[rows] for x in (scores.outcome, scores.format_ok, scores.thinking, scores.overlong)]
        reasons = {at - row: why for at, why in scores.reasons.items() if rows.start <= at < rows.stop}
        found.append(Scores(outcome=cut[0], format_ok=cut[1], thinking=cut[2], overlong=cut[3], reasons=reasons))  # type: ignore[arg-type]
        row = rows.stop
    return found
