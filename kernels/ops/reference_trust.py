"""Plain-PyTorch oracle of trust_advantage, in fp64: segment reductions over ragged groups, no loop, no sync."""
from __future__ import annotations

import torch
from torch import Tensor

from .coefficients import Coefficient, doubled
from .segments import Segments

# The public code's constants: outcomes below ASKED get no thinking score; groups beyond the other two no thinking term.
ASKED, ALL_WRONG, ALL_RIGHT = 0.2, 0.1, 0.9


def forward(
    outcome: Tensor, thinking: Tensor, cu_groups: Tensor, *, alpha: Coefficient, anneal: Coefficient, threshold: Coefficient, mode: str,
    uniform: str, quorum: float, normalize: str, sigma_filter: Coefficient | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(advantage, reward, gamma, used), [B] each; arguments as in `sophiavl_fast.kernels.trust_advantage`, whose checks are taken for granted."""
    alpha, anneal, threshold, sigma_filter = doubled(alpha, anneal, threshold, sigma_filter)
    groups = Segments.of(cu_groups, len(outcome))
    gamma, term, used = _thinking_term(outcome, thinking, groups, threshold, mode, quorum)
    reward = outcome.double() + alpha * anneal * term
    advantage = _normalise(reward, groups, normalize, sigma_filter, eps)
    low, high = groups.extent(outcome)
    equal = groups.spread(low == high)
    if uniform == "skip":
        advantage = advantage.where(~equal, 0)
    elif uniform == "center":
        advantage = torch.where(equal, _normalise(reward, groups, "mean", None, eps), advantage)
    return advantage.float(), reward.float(), gamma.float(), used


def _thinking_term(
    outcome: Tensor, thinking: Tensor, groups: Segments, threshold: float | Tensor, mode: str, quorum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gamma, gamma * thinking, used), [B] each; the term is 0 where it was not used."""
    samples = thinking.double() if thinking.dim() == 2 else thinking.double()[:, None]
    score = samples.mean(1)
    asked = outcome >= ASKED if mode == "repo" else torch.ones_like(outcome, dtype=torch.bool)
    score = score.where(asked, 0)
    scored = ~score.isnan()
    score = score.where(scored, 0)
    wanted, had = groups.sum(asked.double()), groups.sum((asked & scored).double())
    enough = (wanted > 0) & (had / wanted.clamp(min=1) >= quorum)
    if mode == "repo":
        low, high = groups.extent(outcome)
        enough &= (low < ALL_RIGHT) & (high > ALL_WRONG)
    used = groups.spread(enough)

    correct = outcome >= threshold
    if mode == "variance":
        gamma = torch.exp(-samples.var(1, unbiased=False))
    elif mode == "off":
        gamma = torch.ones_like(score)
    else:
        gamma = groups.spread(_group_gamma(score, scored & correct, scored & ~correct, groups, mode))
    term = torch.where(scored, gamma * score, 0)
    term = term.where(scored, groups.spread(groups.mean(term, scored & asked)))
    return gamma.where(used, torch.nan), term.where(used, 0), used


def _group_gamma(score: Tensor, right: Tensor, wrong: Tensor, groups: Segments, mode: str) -> Tensor:
    """exp(min(0, mean of the right - mean of the wrong)), 1 where a side is empty; [G]."""
    some = lambda rows: groups.sum(rows.double()) > 0
    gap = (groups.mean(score, right) - groups.mean(score, wrong)).clamp(max=0)
    return gap.exp().where(some(right) & some(wrong), 1)


def _normalise(reward: Tensor, groups: Segments, normalize: str, sigma_filter: float | Tensor | None, eps: float) -> Tensor:
    """Advantage [B] of a reward [B]. Equal rewards are told by max = min: a computed std of equal numbers need not be 0."""
    if normalize == "none":
        return reward
    if normalize == "batch":
        groups = Segments(torch.zeros_like(groups.index), 1)
    size = groups.sum(torch.ones_like(reward))
    centred = reward - groups.spread(groups.sum(reward) / size.clamp(min=1))
    low, high = groups.extent(reward)
    differ = groups.spread(low < high)
    if normalize == "mean":
        return centred.where(differ, 0)
    std = (groups.sum(centred.square()) / (size - 1).clamp(min=1)).sqrt()
    advantage = (centred / groups.spread(std + eps)).where(differ, 0)
    return advantage if sigma_filter is None else advantage.where(advantage.abs() <= sigma_filter, 0)
