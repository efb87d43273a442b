"""Pieces of the loss's Triton kernels: the search for a token's response, coefficients, and the terms of one block of tokens."""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def last_at_most(bounds, count, x, WIDTH: tl.constexpr, LEVELS: tl.constexpr):
    """Largest i in [0, count) with bounds[i] <= x (0 if there is none), count <= WIDTH ** LEVELS."""
    low = x * 0
    stride = WIDTH ** (LEVELS - 1)
    for _ in tl.static_range(LEVELS):
        at = low + tl.arange(0, WIDTH).to(tl.int64) * stride
        found = tl.load(bounds + at, mask=at < count, other=0).to(tl.int64)
        hits = tl.sum(((at < count) & (found <= x)).to(tl.int32), 0)
        low += tl.maximum(hits - 1, 0).to(tl.int64) * stride
        stride = stride // WIDTH
    return low


@triton.jit
def response_of(bounds, rows, first_token, length, lane, WIDTH: tl.constexpr, LEVELS: tl.constexpr):
    """Response, int32 [BLOCK], of the tokens first_token + lane, lane < length; `rows` for those after the last boundary."""
    first = last_at_most(bounds, rows + 1, first_token, WIDTH, LEVELS).to(tl.int32)
    last = last_at_most(bounds, rows + 1, first_token + length - 1, WIDTH, LEVELS).to(tl.int32)
    row = lane * 0 + first
    step = first * 0 + 1
    while step <= last - first:
        step = step * 2
    while step > 1:
        step = step // 2
        probe = row + step
        ahead = probe <= last
        start = tl.load(bounds + probe, mask=ahead, other=0).to(tl.int64) - first_token
        row = tl.where(ahead & (start <= lane), probe, row)
    return row


@triton.jit
def coefficient(value, ON_DEVICE: tl.constexpr):
    """A coefficient is a number, or the address of one: then a captured graph replays with whatever lies there."""
    if ON_DEVICE:
        value = tl.load(value).to(tl.float32)
    return value


@triton.jit
def k3_estimate(d):
    """exp(d) - d - 1 without cancellation: its series where |d| is small."""
    series = d * d * (0.5 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d * (1 / 5040 + d * (1 / 40320)))))))
    return tl.where(tl.abs(d) < 0.5, series, tl.exp(d) - d - 1)


@triton.jit
def three_counts(a, b, c, BLOCK: tl.constexpr):
    """How many of each of three masks [BLOCK] hold, by one integer reduction."""
    tl.static_assert(BLOCK < 1024, "three counts of ten bits share an int32")
    packed = tl.sum(a.to(tl.int32) + (b.to(tl.int32) << 10) + (c.to(tl.int32) << 20), 0)
    return (packed & 1023).to(tl.float32), ((packed >> 10) & 1023).to(tl.float32), (packed >> 20).to(tl.float32)


@triton.jit
def largest(x):
    """Maximum of non-negative numbers [N]; NaN if one of them is."""
    total = tl.sum(x, 0)
    return tl.where(total == total, tl.max(x, 0), total)


@triton.jit
def times(x, factor):
    """x * factor, and 0 where either is 0, whatever the other has overflowed to: what counts nothing adds nothing."""
    return tl.where((x == 0) | (factor == 0), 0.0, x * factor)


@triton.jit
def policy_term(r, push, new, kept, outside, low_end, high_end, dual_clip, CISPO: tl.constexpr, DUAL_ON_DEVICE: tl.constexpr):
    """Loss and slope of each token (ppo: in the log-ratio; cispo: in the log-prob), and where the clips acted: (policy, slope, low, high, dual)."""
    low, high, dual = kept & (r < low_end), kept & (r > high_end), kept & False
    bounded = tl.where(r < low_end, low_end, tl.where(r > high_end, high_end, r))
    bound = times(bounded, push)
    if CISPO:
        policy = -times(new, bound)
        slope = -bound
    else:
        gain = times(r, push)
        low, high = low & (push < 0), high & (push > 0)
        policy = tl.where(low | high, -bound, -gain)
        if dual_clip is not None:
            cap = coefficient(dual_clip, DUAL_ON_DEVICE)
            dual = (push < 0) & (policy > -cap * push)
            policy = tl.where(dual, -cap * push, policy)
        slope = tl.where(low | high | dual | outside, 0.0, -gain)
    return policy, slope, low, high, dual


@triton.jit
def shared_slope(sums, rows, row, inside, r, outside, kept_count, low_end, high_end, dual_clip, DUAL_ON_DEVICE: tl.constexpr):
    """Slope of a ratio that the whole response shares: each kept token moves it by its 1 / kept_count part. sums [5, rows]."""
    step = rows.to(tl.int64)
    gain = tl.load(sums + 3 * step + row, mask=inside, other=0.0)
    loss = tl.load(sums + 4 * step + row, mask=inside, other=0.0)
    gain = tl.where(r > high_end, 0.0, gain)
    loss = tl.where(r < low_end, 0.0, loss)
    if dual_clip is not None:
        loss = tl.where(r > coefficient(dual_clip, DUAL_ON_DEVICE), 0.0, loss)
    return tl.where(outside, 0.0, -times(r, gain + loss) / kept_count)


@triton.jit
def distance_to_reference(gap, KL: tl.constexpr):
    """(KL estimate, its slope in the log-prob) from gap = ref - new."""
    if KL == 1:
        distance, pull = -gap, gap * 0 + 1
    elif KL == 2:
        distance, pull = gap * gap / 2, -gap
    else:
        distance = k3_estimate(gap)
        pull = -(gap + distance)  # -expm1, which keeps its digits too
    return distance, pull


@triton.jit
def store_partials(
    column, step, live, kept, low, high, dual, outside, capped, total, policy, distance, kl_old, spread, r, weight, diff, BLOCK: tl.constexpr,
):
    """One column of partials, rows as in stats.STATS; total and policy come weighted. Row 4, sequences, is counted elsewhere."""
    live_n, kept_n, _ = three_counts(live, kept, kept, BLOCK)
    low_n, high_n, dual_n = three_counts(low, high, dual & kept, BLOCK)
    pre_n, cap_n, _ = three_counts(outside & kept, capped, kept, BLOCK)
    tl.store(column, tl.sum(total, 0))
    tl.store(column + step, tl.sum(policy, 0))
    tl.store(column + 2 * step, live_n)
    tl.store(column + 3 * step, kept_n)
    tl.store(column + 5 * step, tl.sum(distance, 0))
    tl.store(column + 6 * step, tl.sum(kl_old, 0))
    tl.store(column + 7 * step, tl.sum(spread, 0))
    tl.store(column + 8 * step, tl.sum(r, 0))
    tl.store(column + 9 * step, low_n + high_n)
    tl.store(column + 10 * step, low_n)
    tl.store(column + 11 * step, high_n)
    tl.store(column + 12 * step, dual_n)
    tl.store(column + 13 * step, pre_n)
    tl.store(column + 14 * step, tl.sum(weight, 0))
    tl.store(column + 15 * step, cap_n)
    tl.store(column + 16 * step, tl.sum(tl.abs(diff), 0))
    tl.store(column + 17 * step, largest(r))
    tl.store(column + 18 * step, largest(tl.abs(diff)))
