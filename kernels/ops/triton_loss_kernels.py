"""Triton kernels of grpo_loss: sums of each response (where an option needs them), one pass over tokens, one small reduction.

A token finds its response by search in the boundaries, whose cost does not grow with the lengths: the response of a
block's first and last token by a search with WIDTH arms, and where they differ the tokens between by halving. Sums
leave each block as one column of partials [slots, blocks], added up in fp64 in a fixed order: no atomics, so the same
inputs give the same bits. Masked places are loaded and then replaced by `where`: what they hold reaches nothing.
"""
from __future__ import annotations

import triton
import triton.language as tl

from .triton_loss_parts import coefficient, distance_to_reference, policy_term, response_of, shared_slope, store_partials, times


@triton.jit(do_not_specialize=["rows"])
def response_sums(
    logprob, old, advantage, bounds, mask, mismatch, rollout, sums, rows, tis_cap, TIS_ON_DEVICE: tl.constexpr,
    RATIO: tl.constexpr, ADVANTAGE_BY_TOKEN: tl.constexpr, MISMATCH_BY_TOKEN: tl.constexpr, TIS: tl.constexpr, BLOCK: tl.constexpr,
):
    """sums [5, rows] fp32 of each response: tokens of the mask; and for RATIO, over those kept: their number, their log-ratios, the
    positive and the negative advantages times the truncated importance weight (all that the gradient of a shared ratio needs)."""
    row = tl.program_id(0)
    start, end = tl.load(bounds + row).to(tl.int64), tl.load(bounds + row + 1).to(tl.int64)
    cap = coefficient(tis_cap, TIS_ON_DEVICE) if TIS else 0.0
    live_sum = tl.zeros([BLOCK], tl.float32)
    kept_sum, ratio_sum, gain_sum, loss_sum = live_sum, live_sum, live_sum, live_sum
    while start < end:
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        live = inside
        if mask is not None:
            live &= tl.load(mask + at, mask=inside, other=0) != 0
        live_sum += live.to(tl.float32)
        if RATIO:
            kept = live
            if mismatch is not None:
                kept &= tl.load(mismatch + (at if MISMATCH_BY_TOKEN else at * 0 + row), mask=inside, other=0) != 0
            new = tl.load(logprob + at, mask=inside, other=0.0)
            anchor = new
            if old is not None:
                anchor = tl.load(old + at, mask=inside, other=0.0)
            push = tl.where(kept, tl.load(advantage + (at if ADVANTAGE_BY_TOKEN else at * 0 + row), mask=inside, other=0.0), 0.0)
            if TIS:
                weight = tl.exp(tl.where(kept, anchor - tl.load(rollout + at, mask=inside, other=0.0), 0.0))
                push = times(push, tl.where(weight > cap, cap, weight))
            kept_sum += kept.to(tl.float32)
            ratio_sum += tl.where(kept, new - anchor, 0.0)
            gain_sum += tl.where(push < 0, 0.0, push)
            loss_sum += tl.where(push < 0, push, 0.0)
        start += BLOCK
    tl.store(sums + row, tl.sum(live_sum, 0))
    if RATIO:
        step = rows.to(tl.int64)
        tl.store(sums + step + row, tl.sum(kept_sum, 0))
        tl.store(sums + 2 * step + row, tl.sum(ratio_sum, 0))
        tl.store(sums + 3 * step + row, tl.sum(gain_sum, 0))
        tl.store(sums + 4 * step + row, tl.sum(loss_sum, 0))


@triton.jit(do_not_specialize=["rows", "blocks"])
def token_pass(
    logprob, old, advantage, bounds, mask, mismatch, ref, rollout, entropy, sums, d_logprob, d_entropy, partial, seen, tokens, rows, blocks,
    denominator, max_length, clip_low, clip_high, dual_clip, pre_clip, kl_coef, tis_cap, entropy_coef, ON_DEVICE: tl.constexpr,
    CISPO: tl.constexpr, SEQUENCE_RATIO: tl.constexpr, SEQUENCE_MEAN: tl.constexpr, KL: tl.constexpr, ADVANTAGE_BY_TOKEN: tl.constexpr,
    MISMATCH_BY_TOKEN: tl.constexpr, LOCATE: tl.constexpr, WIDTH: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Loss, statistics and both gradients of BLOCK tokens. ON_DEVICE: bit i set where coefficient i is an address."""
    block = tl.program_id(0)
    first_token = block.to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)  # 32 bits: only each array's base is moved by 64
    length = tl.minimum(tokens - first_token, BLOCK).to(tl.int32)
    there = lane < length
    inside = there
    new = tl.load(logprob + first_token + lane, mask=there, other=0.0)
    anchor = new
    if old is not None:
        anchor = tl.load(old + first_token + lane, mask=there, other=0.0)
    row = lane
    if LOCATE:
        row = response_of(bounds, rows, first_token, length, lane, WIDTH, LEVELS)
        inside &= row < rows
    live = inside
    if mask is not None:
        live &= tl.load(mask + first_token + lane, mask=there, other=0) != 0
    kept = live
    if mismatch is not None:
        if MISMATCH_BY_TOKEN:
            kept &= tl.load(mismatch + first_token + lane, mask=there, other=0) != 0
        else:
            kept &= tl.load(mismatch + row, mask=inside, other=0) != 0
    if ADVANTAGE_BY_TOKEN:
        push = tl.load(advantage + first_token + lane, mask=there, other=0.0)
    else:
        push = tl.load(advantage + row, mask=inside, other=0.0)
    push = tl.where(kept, push, 0.0)
    new_kept = tl.where(kept, new, 0.0)

    # the ratio
    log_ratio = tl.where(kept, new - anchor, 0.0)
    kl_old = -log_ratio
    if SEQUENCE_RATIO:
        kept_count = tl.load(sums + rows.to(tl.int64) + row, mask=inside, other=1.0)
        log_ratio = tl.where(kept, tl.load(sums + 2 * rows.to(tl.int64) + row, mask=inside, other=0.0) / kept_count, 0.0)
    outside = kept & False
    if pre_clip is not None:
        limit = coefficient(pre_clip, ON_DEVICE & 32)
        outside = tl.abs(log_ratio) > limit
        log_ratio = tl.where(log_ratio > limit, limit, tl.where(log_ratio < -limit, -limit, log_ratio))
    r = tl.exp(log_ratio)

    low_end, high_end = 1 - coefficient(clip_low, ON_DEVICE & 4), 1 + coefficient(clip_high, ON_DEVICE & 8)
    policy, slope, low, high, dual = policy_term(r, push, new_kept, kept, outside, low_end, high_end, dual_clip, CISPO, ON_DEVICE & 16)

    # what the engine sampled from
    weight, capped = tl.zeros([BLOCK], tl.float32), outside & False
    diff = weight
    if rollout is not None:
        diff = tl.where(live, anchor - tl.load(rollout + first_token + lane, mask=there, other=0.0), 0.0)
    if tis_cap is not None:
        bound = coefficient(tis_cap, ON_DEVICE & 128)
        weight = tl.exp(tl.where(kept, diff, 0.0))
        capped = kept & (weight > bound)
        weight = tl.where(kept, tl.where(capped, bound, weight), 0.0)
        policy = times(policy, weight)
        slope = times(slope, weight)

    # weight of each token
    scale = tl.full([BLOCK], 1.0, tl.float32)
    if SEQUENCE_MEAN:
        scale = 1 / tl.load(sums + row, mask=live, other=1.0)
    if max_length is not None:
        scale /= coefficient(max_length, ON_DEVICE & 2)
    if denominator is not None:
        scale /= coefficient(denominator, ON_DEVICE & 1)

    if SEQUENCE_RATIO and not CISPO:
        slope = shared_slope(sums, rows, row, inside, r, outside, kept_count, low_end, high_end, dual_clip, ON_DEVICE & 16)
    slope *= scale

    # KL to the reference, entropy
    total = policy
    distance = tl.zeros([BLOCK], tl.float32)
    if ref is not None:
        gap = tl.where(kept, tl.load(ref + first_token + lane, mask=there, other=0.0) - new, 0.0)
        strength = coefficient(kl_coef, ON_DEVICE & 64)
        distance, pull = distance_to_reference(gap, KL)
        total += times(distance, strength)
        slope += times(pull, strength) * scale
    spread = tl.zeros([BLOCK], tl.float32)
    if entropy is not None:
        spread = tl.where(kept, tl.load(entropy + first_token + lane, mask=there, other=0.0), 0.0)
        bonus = coefficient(entropy_coef, ON_DEVICE & 256)
        total -= times(spread, bonus)
        if d_entropy is not None:
            tl.store(d_entropy + first_token + lane, tl.where(kept, -bonus * scale, 0.0), mask=there)
    if d_logprob is not None:
        tl.store(d_logprob + first_token + lane, tl.where(kept, slope, 0.0), mask=there)
    if seen is not None:
        tl.store(seen + row, live.to(tl.uint8), mask=live)  # all writers write 1

    zero = tl.zeros([BLOCK], tl.float32)
    store_partials(partial + block, blocks.to(tl.int64), live, kept, low, high, dual, outside, capped, tl.where(kept, total * scale, zero),
                   tl.where(kept, policy * scale, zero), tl.where(kept, distance, zero), kl_old, spread, tl.where(kept, r, zero), weight, diff, BLOCK)


@triton.jit(do_not_specialize=["rows", "blocks"])
def reduce_partials(partial, bounds, sums, seen, stats, loss, blocks, rows, SUMS: tl.constexpr, SEQUENCES: tl.constexpr, BLOCK: tl.constexpr):
    """Program k: slot k of the statistics, over all blocks (for SEQUENCES: over all responses, those with a token of the mask)."""
    slot = tl.program_id(0)
    sum_, top = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float32)
    start = tl.program_id(0).to(tl.int64) * 0
    if slot == SEQUENCES:
        while start < rows:
            at = start + tl.arange(0, BLOCK)
            inside = at < rows
            if sums is not None:
                has = tl.load(sums + at, mask=inside, other=0.0) > 0
            elif seen is not None:
                has = tl.load(seen + at, mask=inside, other=0) != 0
            else:
                has = tl.load(bounds + at + 1, mask=inside, other=0) > tl.load(bounds + at, mask=inside, other=0)
            sum_ += has.to(tl.float64)
            start += BLOCK
    else:
        while start < blocks:
            at = start + tl.arange(0, BLOCK)
            part = tl.load(partial + slot * blocks.to(tl.int64) + at, mask=at < blocks, other=0.0)
            sum_ += part.to(tl.float64)
            top = tl.maximum(top, part)
            start += BLOCK
    whole = tl.sum(sum_, 0)
    result = whole.to(tl.float32)
    if slot >= SUMS:
        result = tl.where(whole == whole, tl.max(top, 0), result)
    tl.store(stats + slot, result)
    if slot == 0:
        tl.store(loss, result)
