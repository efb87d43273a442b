"""Losses of one packed row, their global denominators, and the metrics that their statistics hold.

A loss is a sum over the row divided by a count over ALL rows and replicas of the optimizer update, never a mean of
means: the gradient is the same however the tokens are cut into micro-batches. All statistics have the layout of
`sophiavl_fast.kernels.STATS`: slots [: SUMS] combine by addition, the rest by maximum.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sophiavl_fast.config import Config
from sophiavl_fast.kernels import STATS, grpo_loss, stats
from sophiavl_fast.kernels.segments import Segments
from sophiavl_fast.types import Batch

LossFn = Callable[[Batch, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def token_count(batches: Iterable[Batch]) -> Tensor:
    """Response tokens of these rows, 0-d fp64 on the CPU: to be summed over replicas."""
    return torch.tensor(float(sum(len(b.target) for b in batches)), dtype=torch.float64)


def weight_of_tokens(batches: Iterable[Batch]) -> Tensor:
    """Response tokens of these rows, each times its response's weight (Batch.advantage), 0-d fp64 on the CPU: to be summed over replicas."""
    return torch.stack([torch.zeros((), dtype=torch.float64), *(b.advantage.double() @ b.cu_seqlens.diff().double() for b in batches)]).sum()


def denominator(batches: Iterable[Batch], config: Config) -> Tensor:
    """What this replica adds to the denominator of one optimizer update, 0-d fp64 on the CPU.

    Tokens for algorithm.aggregate: token, responses for sequence and constant (whose tokens are weighted by
    1 / their number in the response and 1 / rollout.max_new_tokens).
    """
    if config.algorithm.aggregate == "token":
        return token_count(batches)
    return torch.tensor(float(sum(len(b.cu_seqlens) - 1 for b in batches)), dtype=torch.float64)


def make_grpo_loss(config: Config, denominator: Tensor | float) -> LossFn:
    """loss_fn(batch, logprob [T], entropy [T] or None) -> (loss, stats [K]), divided by the global `denominator`."""
    a, count = config.algorithm, float(denominator)
    backend = "auto" if config.policy.kernels == "cpu" else config.policy.kernels  # C++ has no loss of its own: on a CPU auto is the reference

    def loss_fn(batch: Batch, logprob: Tensor, entropy: Tensor | None = None) -> tuple[Tensor, Tensor]:
        agrees = None if a.mismatch_cap is None else matching(batch, logprob, a.mismatch_cap)
        return grpo_loss(
            logprob, batch.advantage, batch.cu_seqlens, old_logprob=batch.old_logprob, denominator=count, variant=a.variant, ratio=a.ratio,
            aggregate=a.aggregate, max_length=config.rollout.max_new_tokens if a.aggregate == "constant" else None,
            clip_low=a.clip_low, clip_high=a.clip_high, dual_clip=a.dual_clip, pre_clip=a.pre_clip, ref_logprob=batch.ref_logprob, kl=a.kl,
            kl_coef=a.kl_coef, rollout_logprob=batch.rollout_logprob, tis_cap=a.tis_cap,
            mismatch_mask=agrees, entropy=entropy, entropy_coef=a.entropy_coef, backend=backend)

    return loss_fn


def active_rows(batch: Batch, config: Config) -> Tensor | None:
    """[A] int64 targets whose log-prob can have a gradient, None: all of them. Where no KL term or entropy bonus pulls at every token these are
    the tokens of responses with an advantage, and the log-prob's backward pass costs no more than they do."""
    a = config.algorithm
    if a.kl_coef > 0 or a.entropy_coef != 0:
        return None
    moves = (batch.advantage != 0).repeat_interleave(batch.cu_seqlens.diff())
    return None if bool(moves.all()) else moves.nonzero()[:, 0]


def matching(batch: Batch, logprob: Tensor, cap: float) -> Tensor:
    """[B] bool: responses whose geometric-mean ratio of policy (old, where it was taken) to rollout a token is within [1/cap, cap]."""
    now = logprob.detach() if batch.old_logprob is None else batch.old_logprob
    packed = Segments.of(batch.cu_seqlens, len(now))
    gap = packed.mean((now - batch.rollout_logprob).double(), torch.ones_like(now, dtype=torch.bool))
    return gap.abs() <= math.log(cap)


def sft_loss(denominator: Tensor | float) -> LossFn:
    """loss_fn of supervised fine-tuning: the negative log-likelihood of the response tokens, each times its response's weight
    (Batch.advantage: 1 but where a target is a distribution over responses), over the global `denominator`."""
    count = float(denominator)

    def loss_fn(batch: Batch, logprob: Tensor, entropy: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight = batch.advantage.repeat_interleave(batch.cu_seqlens.diff(), output_size=len(logprob))
        loss = -(weight * logprob).sum(dtype=torch.float64) / count
        tokens = torch.tensor(float(len(logprob)), device=logprob.device)
        return loss.to(logprob.dtype), stats.pack({"loss": loss, "tokens": tokens}, logprob.device)

    return loss_fn


def metrics(vector: Tensor, config: Config) -> dict[str, float]:
    """Metrics of one update from its combined statistics [K]; NaN where nothing defines one."""
    s = dict(zip(STATS, vector.tolist()))
    kept, tokens = (s[name] or float("nan") for name in ("kept", "tokens"))
    found = {
        "loss": s["loss"],
        "policy/loss": s["policy_loss"],
        "policy/kl_ref": s["kl_ref"] / kept if config.algorithm.kl_coef > 0 else float("nan"),
        "policy/kl_old": s["kl_old"] / kept,
        "policy/clip_frac": s["clipped"] / kept,
        "policy/clip_low_frac": s["clipped_low"] / kept,
        "policy/clip_high_frac": s["clipped_high"] / kept,
        "policy/ratio_mean": s["ratio"] / kept,
        "policy/ratio_max": s["ratio_max"],
        "policy/entropy": s["entropy"] / kept,
        "rollout/logprob_diff_mean": s["rollout_diff"] / tokens,
        "rollout/logprob_diff_max": s["rollout_diff_max"],
    }
    if config.algorithm.mismatch_cap is not None:
        found["policy/mismatch_frac"] = 1 - s["kept"] / tokens
    optional = {"dual_clip": ("policy/dual_clip_frac", "dual_clipped"), "pre_clip": ("policy/pre_clip_frac", "pre_clipped"),
                "tis_cap": ("policy/tis_weight_mean", "tis_weight")}
    return found | {key: s[slot] / kept for option, (key, slot) in optional.items() if getattr(config.algorithm, option) is not None}


def sft_metrics(vector: Tensor) -> dict[str, float]:
    """Metrics of one fine-tuning update from its combined statistics [K]."""
    s = dict(zip(STATS, vector.tolist()))
    return {"loss": s["loss"], "train/tokens": s["tokens"]}
