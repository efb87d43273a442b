"""The statistics vector of grpo_loss: one fp32 tensor [K], never means, so that micro-batches and ranks combine exactly.

Slots [: SUMS] combine by addition, slots [SUMS :] by maximum:

    total = merge(total, part)                                          # micro-batches
    all_reduce(total[:SUMS], SUM); all_reduce(total[SUMS:], MAX)        # ranks
"""
from __future__ import annotations

import torch
from torch import Tensor

_SUMS = (
    "loss",              # the loss itself, divided by the denominator: adds up to the step's loss
    "policy_loss",       # its policy term
    "tokens",            # tokens of the mask
    "kept",              # of these, those that mismatch_mask leaves in; what follows sums over them
    "sequences",         # responses with at least one token of the mask
    "kl_ref",            # KL estimate to the reference a token, unweighted
    "kl_old",            # old - new log-prob
    "entropy",           # nats
    "ratio",             # new / old, before any clip
    "clipped",           # tokens whose policy gradient the clip took away (ppo) or whose weight it bounded (cispo)
    "clipped_low",       # of these, below 1 - clip_low
    "clipped_high",      # of these, above 1 + clip_high
    "dual_clipped",      # tokens bounded by dual_clip
    "pre_clipped",       # tokens whose log-ratio lay outside +-pre_clip
    "tis_weight",        # truncated importance weight
    "tis_capped",        # tokens at the cap
    "rollout_diff",      # |old - engine| log-prob of the sampled token, over `tokens`
)
_MAXIMA = ("ratio_max", "rollout_diff_max")

STATS: tuple[str, ...] = _SUMS + _MAXIMA
SUMS: int = len(_SUMS)


def empty(device: torch.device | str = "cpu") -> Tensor:
    """The statistics of no tokens: the neutral element of `merge` (every maximum is of non-negative numbers)."""
    return torch.zeros(len(STATS), device=device)


def merge(a: Tensor, b: Tensor) -> Tensor:
    """The statistics [K] of two sets of tokens together."""
    return torch.cat((a[:SUMS] + b[:SUMS], torch.maximum(a[SUMS:], b[SUMS:])))


def pack(slots: dict[str, Tensor], device: torch.device) -> Tensor:
    """A vector from named 0-d tensors; slots left out are 0."""
    zero = torch.zeros((), device=device)
    return torch.stack([slots.get(name, zero).detach().float() for name in STATS])
