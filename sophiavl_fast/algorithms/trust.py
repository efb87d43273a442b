"""Trust-GRPO's advantages (SophiaVL-R1, arXiv 2505.17018, sec. 3.4) and the metrics that show what trust did.

reward = outcome + gamma * alpha * anneal(step) * thinking. The statistics are `sophiavl_fast.kernels.trust_advantage`;
here the configuration meets them. With the thinking reward off this is plain GRPO, to the bit. A length penalty (DAPO) is a
further term of the reward; whether a response counts as correct, and so gamma, depends on the outcome alone.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from sophiavl_fast.config import Config
from sophiavl_fast.kernels import Trust, trust_advantage
from sophiavl_fast.types import Scores


def anneal_factor(step: int, config: Config) -> float:
    """Weight of the thinking reward after `step` rollout steps done (from 0), relative to its start; T is trust.anneal_steps.

    exp: exp(-step/T). linear: a straight line over the same range, from 1 to exp(-1) at T, where it stays (App. E).
    """
    total = config.run.steps if config.trust.anneal_steps is None else config.trust.anneal_steps
    if config.trust.anneal == "none":
        return 1.0
    if config.trust.anneal == "exp":
        return math.exp(-step / total)
    return 1 - (1 - math.exp(-1)) * min(step / total, 1)


def advantages(scores: Scores, sizes: list[int], step: int, config: Config) -> tuple[Trust, dict[str, float]]:
    """Advantages of groups of `sizes` responses, in the order of `scores`, and the step's metrics.

    step counts rollout steps done, from 0. Metrics are means over these responses; NaN where nothing defines one.
    """
    thinking = None if config.algorithm.name == "grpo" else scores.thinking
    outcome, anneal = scores.outcome.float(), anneal_factor(step, config)
    given = torch.full_like(outcome, torch.nan) if thinking is None else thinking
    boundaries = torch.tensor([0, *sizes], device=outcome.device).cumsum(0)
    trust = trust_advantage(
        outcome, given, boundaries, alpha=config.trust.alpha, anneal=anneal, threshold=config.trust.threshold,
        mode="off" if thinking is None else config.trust.mode, uniform=config.trust.uniform_groups, quorum=config.thinking.quorum,
        normalize=config.algorithm.normalize, sigma_filter=config.algorithm.sigma_filter)
    bonus = torch.zeros_like(outcome) if scores.overlong is None else scores.overlong.to(outcome)
    if scores.overlong is not None:  # the thinking term as it was found, on an outcome that now holds the penalty
        scale = 2.0 ** (1 + max(0, math.frexp(config.trust.alpha)[1]))  # a power of two above alpha: the term as a score in [0, 1], to the bit
        again = trust_advantage(
            outcome + bonus, (trust.reward - outcome) / scale, boundaries, alpha=scale, anneal=1.0, threshold=config.trust.threshold, mode="off",
            uniform=config.trust.uniform_groups, quorum=1.0, normalize=config.algorithm.normalize, sigma_filter=config.algorithm.sigma_filter)
        trust = Trust(again.advantage, again.reward, trust.gamma, trust.used)
    scored = ~(given if given.dim() == 1 else given.sum(1)).isnan()
    row_group = torch.repeat_interleave(torch.tensor(sizes, device=outcome.device))
    return trust, {
        "trust/gamma": _mean_gamma(trust, outcome >= config.trust.threshold, scored, row_group, len(sizes), config),
        "trust/weight": config.trust.alpha * anneal,
        "trust/uniform_share": _uniform_share(trust.advantage, outcome, row_group, len(sizes)),
        "reward/total": trust.reward.mean().item(),
        "reward/outcome": outcome.mean().item(),
        "reward/thinking": given[scored].mean().item(),
        "trust/rank_corr": _rank_correlation(given if given.dim() == 1 else given.mean(1), outcome, scored),
        **({} if scores.overlong is None else {"reward/overlong": bonus.mean().item()}),
        "reward/unscored": 0.0 if thinking is None else (~scored).float().mean().item(),
    }


def _mean_gamma(trust: Trust, correct: Tensor, scored: Tensor, row_group: Tensor, groups: int, config: Config) -> float:
    """Mean over the groups that define a gamma: a thinking term, and for a comparison of sides both of them scored."""
    counts = lambda rows: torch.zeros(groups, device=rows.device).index_add(0, row_group, rows.float())
    own = trust.used & ~trust.gamma.isnan()
    defined = counts(own) > 0
    if config.trust.mode in ("paper", "repo"):
        defined &= (counts(scored & correct) > 0) & (counts(scored & ~correct) > 0)
    total = torch.zeros(groups, device=row_group.device).index_add(0, row_group, trust.gamma.where(own, 0))
    return (total / counts(own))[defined].mean().item()


def _rank_correlation(thinking: Tensor, outcome: Tensor, scored: Tensor) -> float:
    """Spearman's rank correlation of thinking and outcome over the scored responses, ties at their mean rank; NaN where one of them is constant."""
    ranks = torch.stack([_mean_ranks(x[scored].double()) for x in (thinking, outcome)])
    if scored.sum() < 2:
        return math.nan
    centred = ranks - ranks.mean(1, keepdim=True)
    size = centred.norm(dim=1).prod().item()
    return (centred[0] @ centred[1]).item() / size if size > 0 else math.nan


def _mean_ranks(values: Tensor) -> Tensor:
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[place]


def _uniform_share(advantage: Tensor, outcome: Tensor, row_group: Tensor, groups: int) -> float:
    """Share of sum |advantage| that comes from groups whose outcomes are all equal; 0 where there is no advantage at all."""
    high = outcome.new_full((groups,), -torch.inf).scatter_reduce(0, row_group, outcome, "amax")
    low = outcome.new_full((groups,), torch.inf).scatter_reduce(0, row_group, outcome, "amin")
    size, equal = advantage.abs(), (low == high)[row_group]
    total = size.sum().item()
    return size[equal].sum().item() / total if total else 0.0
