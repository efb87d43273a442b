"""Plain-PyTorch oracle of grpo_loss, gradients by formula, sums in fp64. (Its own oracle is autograd on single tokens, in the tests.)"""
from __future__ import annotations

import torch
from torch import Tensor

from . import stats
from .coefficients import Coefficient, doubled
from .segments import Segments


def forward(
    logprob: Tensor, advantage: Tensor, cu_seqlens: Tensor, *, old_logprob: Tensor | None, mask: Tensor | None, denominator: Coefficient | None,
    variant: str, ratio: str, aggregate: str, max_length: Coefficient | None, clip_low: Coefficient, clip_high: Coefficient,
    dual_clip: Coefficient | None, pre_clip: Coefficient | None, ref_logprob: Tensor | None, kl: str, kl_coef: Coefficient,
    rollout_logprob: Tensor | None, tis_cap: Coefficient | None, mismatch_mask: Tensor | None, entropy: Tensor | None,
    entropy_coef: Coefficient, gradient: bool, entropy_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(loss, stats [K], d loss / d logprob [T] or None, d loss / d entropy [T] or None); arguments as in `sophiavl_fast.kernels.grpo_loss`."""
    denominator, max_length, clip_low, clip_high, dual_clip, pre_clip, kl_coef, tis_cap, entropy_coef = doubled(
        denominator, max_length, clip_low, clip_high, dual_clip, pre_clip, kl_coef, tis_cap, entropy_coef)
    packed = Segments.of(cu_seqlens, len(logprob))
    live = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask
    kept = live if mismatch_mask is None else live & packed.spread(mismatch_mask)
    # `where` first, everything else after: a NaN in a masked place reaches neither a value nor a gradient.
    only = lambda x: x.where(kept, 0)
    count = lambda x: (x & kept).sum()
    total = lambda x: x.sum(dtype=torch.float64)
    new, spread_advantage = only(logprob), only(packed.spread(advantage))
    old = new if old_logprob is None else only(old_logprob)
    slots = {"tokens": live.sum(), "kept": kept.sum(), "sequences": (packed.sum(live.double()) > 0).sum()}

    log_ratio = new - old
    slots["kl_old"] = total(-log_ratio)
    if ratio == "sequence":
        log_ratio = packed.spread(packed.mean(log_ratio, kept))
    frozen = torch.zeros_like(kept)
    if pre_clip is not None:
        frozen = log_ratio.abs() > pre_clip
        slots["pre_clipped"] = count(frozen)
        log_ratio = log_ratio.clamp(-pre_clip, pre_clip)
    r = log_ratio.exp()
    slots |= {"ratio": total(only(r)), "ratio_max": _largest(only(r))}
    loss, slope, clipped = _policy_term(r, new, spread_advantage, variant, clip_low, clip_high, dual_clip)
    slope = slope.where(~frozen, 0) if variant == "ppo" else slope
    slots |= {name: count(where) for name, where in clipped.items()}

    if rollout_logprob is not None:
        diff = ((logprob if old_logprob is None else old_logprob) - rollout_logprob).where(live, 0)
        slots |= {"rollout_diff": total(diff.abs()), "rollout_diff_max": _largest(diff.abs())}
    if tis_cap is not None:
        weight = only(diff).exp()
        capped = weight.clamp(max=tis_cap)
        slots |= {"tis_weight": total(only(capped)), "tis_capped": count(weight > tis_cap)}
        loss, slope = _times(loss, capped), _times(slope, capped)
    scale = _weights(packed, live, aggregate, max_length) / (1.0 if denominator is None else denominator)
    policy_loss, slope = loss, slope * scale
    if variant == "ppo" and ratio == "sequence":  # every kept token of the response moves the one ratio that they share
        slope = packed.spread(packed.mean(slope, kept))
    if ref_logprob is not None:
        distance, pull = _kl(only(ref_logprob) - new, kl)
        slots["kl_ref"] = total(only(distance))
        loss, slope = loss + _times(distance, kl_coef), slope + _times(pull, kl_coef) * scale
    if entropy is not None:
        slots["entropy"] = total(only(entropy))
        loss = loss - _times(only(entropy), entropy_coef)

    reduce = lambda x: total((x * scale).where(kept, 0))
    slots |= {"loss": (result := reduce(loss)), "policy_loss": reduce(policy_loss)}
    d_logprob = only(slope).to(logprob.dtype) if gradient else None
    d_entropy = only(torch.zeros_like(logprob) - entropy_coef * scale).to(entropy.dtype) if entropy_gradient and entropy is not None else None
    return result.to(logprob.dtype), stats.pack(slots, logprob.device), d_logprob, d_entropy


def _policy_term(
    r: Tensor, new: Tensor, advantage: Tensor, variant: str, clip_low: Coefficient, clip_high: Coefficient, dual_clip: Coefficient | None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss of each token, its slope (ppo: in the log-ratio; cispo: in the log-prob), and where each kind of clip acted."""
    bound = _times(r.clamp(min=1 - clip_low).clamp(max=1 + clip_high), advantage)
    if variant == "cispo":
        low, high = r < 1 - clip_low, r > 1 + clip_high
        return -_times(new, bound), -bound, {"clipped": low | high, "clipped_low": low, "clipped_high": high}
    gain = _times(r, advantage)
    low, high = (r < 1 - clip_low) & (advantage < 0), (r > 1 + clip_high) & (advantage > 0)
    flat = low | high
    loss = torch.maximum(-gain, -bound)
    where = {"clipped": flat, "clipped_low": low, "clipped_high": high}
    if dual_clip is not None:
        where["dual_clipped"] = (advantage < 0) & (loss > -dual_clip * advantage)
        loss = torch.where(where["dual_clipped"], -dual_clip * advantage, loss)
        flat = flat | where["dual_clipped"]
    return loss, (-gain).where(~flat, 0), where


def _times(x: Tensor, factor: Coefficient) -> Tensor:
    """x * factor, and 0 where either is 0, whatever the other has overflowed to: what counts nothing adds nothing."""
    if isinstance(factor, Tensor):
        return (x * factor).where((x != 0) & (factor != 0), 0)
    return x * factor if factor else torch.zeros_like(x)


def _kl(distance: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Estimates of KL(new || reference) from ref - new, a token (Schulman, "Approximating KL divergence", 2020); and their slope in new."""
    if kind == "k1":
        return -distance, torch.ones_like(distance)
    if kind == "k2":
        return distance.square() / 2, -distance
    wide = distance.double()  # expm1(d) - d of a small d would cancel in fp32
    return (wide.expm1() - wide).to(distance.dtype), -distance.expm1()


def _largest(x: Tensor) -> Tensor:
    """Maximum of non-negative numbers, 0 of none."""
    return torch.cat((x, x.new_zeros(1))).amax()


def _weights(packed: Segments, live: Tensor, aggregate: str, max_length: Coefficient | None) -> Tensor | float:
    if aggregate == "sequence":
        return packed.spread(1 / packed.sum(live.double()).clamp(min=1))
    return 1.0 if max_length is None else 1 / max_length
