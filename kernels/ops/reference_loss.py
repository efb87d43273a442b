"""Plain-PyTorch oracle of grpo_loss; gradients by autograd, sums in fp64."""
from __future__ import annotations

import torch
from torch import Tensor

from . import stats
from .segments import Segments


def grpo_loss(
    logprob: Tensor, advantage: Tensor, cu_seqlens: Tensor, *, old_logprob: Tensor | None, mask: Tensor | None, denominator: float | Tensor | None,
    variant: str, ratio: str, aggregate: str, max_length: float | Tensor | None, clip_low: float | Tensor, clip_high: float | Tensor,
    dual_clip: float | Tensor | None, pre_clip: float | Tensor | None, ref_logprob: Tensor | None, kl: str, kl_coef: float | Tensor,
    rollout_logprob: Tensor | None, tis_cap: float | Tensor | None, mismatch_mask: Tensor | None, entropy: Tensor | None,
    entropy_coef: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """See `sophiavl_fast.kernels.grpo_loss`; what it checks is taken for granted here."""
    packed = Segments.of(cu_seqlens, len(logprob))
    live = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask
    kept = live if mismatch_mask is None else live & packed.spread(mismatch_mask)
    # `where` first, everything else after: a NaN in a masked place reaches neither a value nor a gradient.
    only = lambda x: x.where(kept, 0)
    count = lambda x: (x & kept).sum()
    total = lambda x: x.detach().sum(dtype=torch.float64)
    new, spread_advantage = only(logprob), only(packed.spread(advantage))
    old = new.detach() if old_logprob is None else only(old_logprob)
    slots = {"tokens": live.sum(), "kept": kept.sum(), "sequences": (packed.sum(live.double()) > 0).sum()}

    log_ratio = new - old
    slots["kl_old"] = total(-log_ratio)
    if ratio == "sequence":
        log_ratio = packed.spread(packed.mean(log_ratio, kept))
    if pre_clip is not None:
        slots["pre_clipped"] = count(log_ratio.abs() > pre_clip)
        log_ratio = log_ratio.clamp(-pre_clip, pre_clip)
    r = log_ratio.exp()
    slots |= {"ratio": total(only(r)), "ratio_max": _largest(only(r.detach()))}
    loss, clipped = _policy_term(r, new, spread_advantage, variant, clip_low, clip_high, dual_clip)
    slots |= {name: count(where) for name, where in clipped.items()}

    if rollout_logprob is not None:
        diff = ((logprob if old_logprob is None else old_logprob).detach() - rollout_logprob).where(live, 0)
        slots |= {"rollout_diff": total(diff.abs()), "rollout_diff_max": _largest(diff.abs())}
    if tis_cap is not None:
        weight = only(diff).exp()
        slots |= {"tis_weight": total(only(weight.clamp(max=tis_cap))), "tis_capped": count(weight > tis_cap)}
        loss = loss * weight.clamp(max=tis_cap)
    policy_loss = loss.detach()
    if ref_logprob is not None:
        distance = _kl(only(ref_logprob) - new, kl)
        slots["kl_ref"] = total(only(distance))
        loss = loss + kl_coef * distance
    if entropy is not None:
        slots["entropy"] = total(only(entropy))
        if isinstance(entropy_coef, Tensor) or entropy_coef:  # else no gradient at all, which spares the log-prob's backward pass half its work
            loss = loss - entropy_coef * only(entropy)

    scale = _weights(packed, live, aggregate, max_length)
    reduce = lambda x: (x * scale).where(kept, 0).sum(dtype=torch.float64) / (1.0 if denominator is None else denominator)
    slots |= {"loss": (result := reduce(loss)), "policy_loss": reduce(policy_loss)}
    return result.to(logprob.dtype), stats.pack(slots, logprob.device)


def _policy_term(
    r: Tensor, new: Tensor, advantage: Tensor, variant: str, clip_low: float | Tensor, clip_high: float | Tensor, dual_clip: float | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each token, and where each kind of clip acted."""
    bounded = r.clamp(min=1 - clip_low).clamp(max=1 + clip_high)
    if variant == "cispo":
        low, high = r < 1 - clip_low, r > 1 + clip_high
        return -bounded.detach() * advantage * new, {"clipped": low | high, "clipped_low": low, "clipped_high": high}
    low, high = (r < 1 - clip_low) & (advantage < 0), (r > 1 + clip_high) & (advantage > 0)
    loss = torch.maximum(-r * advantage, -bounded * advantage)
    where = {"clipped": low | high, "clipped_low": low, "clipped_high": high}
    if dual_clip is not None:
        where["dual_clipped"] = (advantage < 0) & (loss > -dual_clip * advantage)
        loss = torch.where(where["dual_clipped"], -dual_clip * advantage, loss)
    return loss, where


def _kl(distance: Tensor, kind: str) -> Tensor:
    """Estimates of KL(new || reference) from ref - new, a token (Schulman, "Approximating KL divergence", 2020)."""
    if kind == "k1":
        return -distance
    return distance.square() / 2 if kind == "k2" else distance.expm1() - distance


def _largest(x: Tensor) -> Tensor:
    """Maximum of non-negative numbers, 0 of none."""
    return torch.cat((x, x.new_zeros(1))).amax()


def _weights(packed: Segments, live: Tensor, aggregate: str, max_length: float | Tensor | None) -> Tensor | float:
    if aggregate == "sequence":
        return packed.spread(1 / packed.sum(live.double()).clamp(min=1))
    return 1.0 if max_length is None else 1 / max_length
