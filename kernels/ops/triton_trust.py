"""trust_advantage in Triton: one launch, a program a group; two where the advantage is normalised over the whole batch.

The whole batch is a few hundred kilobytes at most, so launches are the cost, not bytes: everything is computed in fp64, from
fp32 inputs, as in the reference. A group's rows are read again for each of its passes (means before deviations), from cache.
"""
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coefficients import launched
from .shipped import Launch, Shipped
from .triton_loss_parts import coefficient
from .trust_advantage import COEFFICIENTS, MODES, NORMALIZE, UNIFORM

GROUP = {"BLOCK": 32, "num_warps": 1}
BATCH = {"BLOCK": 1024, "num_warps": 4}
PARTIALS = 2048  # most programs of the first launch where a second one reads the sums of all of them


@triton.jit
def scores_of(thinking, rows, inside, K, SAMPLES: tl.constexpr, VARIANCE: tl.constexpr):
    """Mean of each row's K scores, fp64 [BLOCK], and their population variance (0 unless VARIANCE); one NaN makes both NaN."""
    total = tl.zeros(rows.shape, tl.float64)
    spread = total
    k = 0
    while k < K:
        total += tl.load(thinking + rows * K + k, mask=inside, other=0.0).to(tl.float64)
        k += 1
    mean = total / K if SAMPLES else total
    if VARIANCE:
        k = 0
        while k < K:
            gap = tl.load(thinking + rows * K + k, mask=inside, other=0.0).to(tl.float64) - mean
            spread += gap * gap
            k += 1
        spread = spread / K
    return mean, spread


@triton.jit(do_not_specialize=["groups", "per_program"])
def group_rewards(
    outcome, thinking, bounds, advantage, reward, gamma, used, exact, whiten, partial, groups, per_program, K, alpha, anneal, threshold, quorum, eps,
    ON_DEVICE: tl.constexpr, MODE: tl.constexpr, UNIFORM: tl.constexpr, NORMALIZE: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
):
    """Trust weight, reward and advantage of `per_program` groups. MODE, UNIFORM, NORMALIZE: index in the tuples of trust_advantage.py.

    For NORMALIZE = batch: exact fp64 rewards, whether a row awaits the whole batch's mean, and partial [5, programs]: rows,
    mean, sum of squared deviations, smallest and largest reward of the program's groups.
    """
    weight = (coefficient(alpha, ON_DEVICE & 1) + tl.zeros([BLOCK], tl.float64)) * coefficient(anneal, ON_DEVICE & 2)
    limit = coefficient(threshold, ON_DEVICE & 4)
    zero, lane = tl.zeros([BLOCK], tl.float64), tl.arange(0, BLOCK)
    count_all, mean_all, square_all = tl.sum(zero, 0), tl.sum(zero, 0), tl.sum(zero, 0)
    low_all, high_all = count_all + float("inf"), count_all - float("inf")
    group = tl.program_id(0).to(tl.int64) * per_program
    end = tl.minimum(group + per_program, groups)
    while group < end:
        first, last = tl.load(bounds + group).to(tl.int64), tl.load(bounds + group + 1).to(tl.int64)

        # who was asked, who was scored, the two sides
        asked_n, had_n, right_n, wrong_n, right, wrong, known = zero, zero, zero, zero, zero, zero, zero
        low, high = tl.full([BLOCK], float("inf"), tl.float32), tl.full([BLOCK], float("-inf"), tl.float32)
        start = first
        while start < last:
            rows = start + lane
            inside = rows < last
            o = tl.load(outcome + rows, mask=inside, other=0.0)
            score, variance = scores_of(thinking, rows, inside, K, SAMPLES, MODE == 2)
            asked = inside
            if MODE == 1:
                asked = inside & (o >= 0.2)
                score = tl.where(asked, score, 0.0)
            scored = inside & (score == score)
            score = tl.where(scored, score, 0.0)
            asked_n += asked.to(tl.float64)
            had_n += (asked & scored).to(tl.float64)
            side = o >= limit
            right_n += (scored & side).to(tl.float64)
            wrong_n += (scored & (side == 0)).to(tl.float64)
            right += tl.where(side, score, 0.0)
            wrong += tl.where(side, 0.0, score)
            if MODE == 2:
                score = tl.where(scored, score * tl.exp(-variance), 0.0)
            known += tl.where(asked, score, 0.0)
            low = tl.minimum(low, tl.where(inside, o, float("inf")))
            high = tl.maximum(high, tl.where(inside, o, float("-inf")))
            start += BLOCK
        asked_count, had = tl.sum(asked_n, 0), tl.sum(had_n, 0)
        low_outcome, high_outcome = tl.min(low, 0), tl.max(high, 0)
        # in fp32, as the quorum came: 4 of 5 reach 0.8
        enough = (asked_count > 0) & ((had / tl.maximum(asked_count, 1.0)).to(tl.float32) >= quorum)
        if MODE == 1:
            enough &= (low_outcome < 0.9) & (high_outcome > 0.1)
        trust = tl.sum(zero, 0) + 1.0
        if MODE < 2:
            rights, wrongs = tl.sum(right_n, 0), tl.sum(wrong_n, 0)
            gap = tl.sum(right, 0) / tl.maximum(rights, 1.0) - tl.sum(wrong, 0) / tl.maximum(wrongs, 1.0)
            trust = tl.where((rights > 0) & (wrongs > 0), tl.exp(tl.minimum(gap, 0.0)), 1.0)
        neutral = tl.sum(known, 0) * trust / tl.maximum(had, 1.0)  # the term of a row that was not scored

        # rewards
        total, size = zero, (last - first).to(tl.float64)
        low_r, high_r = zero + float("inf"), zero - float("inf")
        start = first
        while start < last:
            rows = start + lane
            inside = rows < last
            o = tl.load(outcome + rows, mask=inside, other=0.0)
            score, variance = scores_of(thinking, rows, inside, K, SAMPLES, MODE == 2)
            if MODE == 1:
                score = tl.where(o >= 0.2, score, 0.0)
            factor = trust + zero
            if MODE == 2:
                factor = tl.exp(-variance)
            term = tl.where(score == score, factor * score, neutral)
            r = o.to(tl.float64) + weight * tl.where(enough, term, 0.0)
            tl.store(exact + rows, r, mask=inside)
            tl.store(reward + rows, r.to(tl.float32), mask=inside)
            tl.store(gamma + rows, tl.where(enough, factor, float("nan")).to(tl.float32), mask=inside)
            tl.store(used + rows, (enough & inside).to(tl.uint8), mask=inside)
            total += tl.where(inside, r, 0.0)
            low_r = tl.minimum(low_r, tl.where(inside, r, float("inf")))
            high_r = tl.maximum(high_r, tl.where(inside, r, float("-inf")))
            start += BLOCK
        mean = tl.sum(total, 0) / tl.maximum(size, 1.0)
        smallest, largest = tl.min(low_r, 0), tl.max(high_r, 0)

        tl.debug_barrier()  # the rewards are read back

        # deviations
        squares = zero
        start = first
        while start < last:
            rows = start + lane
            inside = rows < last
            away = tl.where(inside, tl.load(exact + rows, mask=inside, other=0.0) - mean, 0.0)
            squares += away * away
            start += BLOCK
        square = tl.sum(squares, 0)
        std = tl.sqrt(square / tl.maximum(size - 1, 1.0))
        equal = low_outcome == high_outcome
        start = first
        while start < last:
            rows = start + lane
            inside = rows < last
            r = tl.load(exact + rows, mask=inside, other=0.0)
            # equal rewards are told by max = min: a computed deviation of equal numbers need not be 0
            centred = tl.where(smallest < largest, r - mean, 0.0)
            a = r
            if NORMALIZE == 0:
                a = tl.where(smallest < largest, (r - mean) / (std + eps), 0.0)
            elif NORMALIZE == 1:
                a = centred
            if UNIFORM == 1:
                a = tl.where(equal, centred, a)
            elif UNIFORM == 2:
                a = tl.where(equal, 0.0, a)
            tl.store(advantage + rows, a.to(tl.float32), mask=inside)
            if NORMALIZE == 2:
                tl.store(whiten + rows, (inside & ((equal == 0) | (UNIFORM == 0))).to(tl.uint8), mask=inside)
            start += BLOCK

        # sums of two sets of rows together (Chan, Golub & LeVeque 1979)
        both = tl.maximum(count_all + size, 1.0)
        apart = mean - mean_all
        square_all += square + apart * apart * count_all * size / both
        mean_all += apart * size / both
        count_all += size
        low_all, high_all = tl.minimum(low_all, smallest), tl.maximum(high_all, largest)
        group += 1
    if NORMALIZE == 2:
        column, step = partial + tl.program_id(0), tl.num_programs(0)
        tl.store(column, count_all)
        tl.store(column + step, mean_all)
        tl.store(column + 2 * step, square_all)
        tl.store(column + 3 * step, low_all)
        tl.store(column + 4 * step, high_all)


@triton.jit(do_not_specialize=["rows_total", "programs"])
def whiten_batch(exact, whiten, partial, advantage, rows_total, programs, eps, sigma_filter, ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr):
    """Advantage of the rows that await the whole batch's mean and deviation; each program adds up all partials for itself."""
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.float64)
    count, weighted, low, high = zero, zero, zero + float("inf"), zero - float("inf")
    start = 0
    while start < programs:
        at = start + lane
        inside = at < programs
        n = tl.load(partial + at, mask=inside, other=0.0)
        count += n
        weighted += n * tl.load(partial + programs + at, mask=inside, other=0.0)
        low = tl.minimum(low, tl.load(partial + 3 * programs + at, mask=inside, other=float("inf")))
        high = tl.maximum(high, tl.load(partial + 4 * programs + at, mask=inside, other=float("-inf")))
        start += BLOCK
    size = tl.sum(count, 0)
    mean = tl.sum(weighted, 0) / tl.maximum(size, 1.0)
    squares = zero
    start = 0
    while start < programs:
        at = start + lane
        inside = at < programs
        apart = tl.where(inside, tl.load(partial + programs + at, mask=inside, other=0.0) - mean, 0.0)
        squares += tl.load(partial + 2 * programs + at, mask=inside, other=0.0) + tl.load(partial + at, mask=inside, other=0.0) * apart * apart
        start += BLOCK
    std = tl.sqrt(tl.sum(squares, 0) / tl.maximum(size - 1, 1.0))
    rows = tl.program_id(0).to(tl.int64) * BLOCK + lane
    inside = rows < rows_total
    awaits = tl.load(whiten + rows, mask=inside, other=0) != 0
    a = (tl.load(exact + rows, mask=inside, other=0.0) - mean) / (std + eps)
    a = tl.where(tl.min(low, 0) < tl.max(high, 0), a, 0.0)
    if sigma_filter is not None:
        a = tl.where(tl.abs(a) <= coefficient(sigma_filter, ON_DEVICE & 8), a, 0.0)
    tl.store(advantage + rows, a.to(tl.float32), mask=inside & awaits)


def forward(outcome: Tensor, thinking: Tensor, cu_groups: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(advantage, reward, gamma, used); arguments as in `reference_trust.forward`, outcome and thinking fp32."""
    launches, results = plan(outcome, thinking, cu_groups, **options)
    for launch in launches:
        launch()
    return results


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve, None: it can."""
    return None if dtype == torch.float32 else f"it reads float32, the outcomes are {dtype}"


def plan(outcome: Tensor, thinking: Tensor, cu_groups: Tensor, **o: Any) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The launches in order, and the tensors that they fill."""
    rows, groups, device = len(outcome), len(cu_groups) - 1, outcome.device
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=device)
    batch = o["normalize"] == "batch"
    per = -(-groups // PARTIALS) if batch else 1
    programs = -(-groups // max(per, 1))
    values, on_device = launched(COEFFICIENTS, o)
    sigma = values.pop("sigma_filter")
    advantage, reward, gamma, used = new(rows), new(rows), new(rows), new(rows, dtype=torch.bool)
    exact, whiten = new(rows, dtype=torch.float64), new(rows, dtype=torch.uint8) if batch else None
    partial = new(5, programs, dtype=torch.float64) if batch else None
    results = {"advantage": advantage, "exact": exact, "whiten": whiten, "partial": partial}
    launches = [Launch(
        kernel=group_rewards, grid=(programs,), num_warps=GROUP["num_warps"],
        arguments=results | values | {
            "outcome": outcome.contiguous(), "thinking": thinking.contiguous(), "bounds": cu_groups.contiguous(), "reward": reward, "gamma": gamma,
            "used": used.view(torch.uint8), "groups": groups, "per_program": per, "K": 1 if thinking.dim() == 1 else thinking.shape[1],
            "quorum": float(o["quorum"]), "eps": float(o["eps"]), "ON_DEVICE": on_device, "MODE": MODES.index(o["mode"]),
            "UNIFORM": UNIFORM.index(o["uniform"]), "NORMALIZE": NORMALIZE.index(o["normalize"]), "SAMPLES": thinking.dim() == 2, "BLOCK": GROUP["BLOCK"]})]
    if batch:
        launches.append(Launch(
            kernel=whiten_batch, grid=(-(-rows // BATCH["BLOCK"]),), num_warps=BATCH["num_warps"],
            arguments=results | {"rows_total": rows, "programs": programs, "eps": float(o["eps"]), "sigma_filter": sigma, "ON_DEVICE": on_device,
                                 "BLOCK": BATCH["BLOCK"]}))
    return launches, (advantage, reward, gamma, used)


def shipped() -> list[Shipped]:
    """What the trainer's algorithms launch: Trust-GRPO in its modes, and StableReinforce."""
    outcome, bounds = torch.empty(4096, device="meta"), torch.empty(513, dtype=torch.int64, device="meta")
    base = {"alpha": 0.3, "anneal": 1.0, "threshold": 0.5, "uniform": "score", "quorum": 1.0, "normalize": "std", "sigma_filter": None, "eps": 1e-6}
    found = []
    for name, change in {"paper": {"mode": "paper"}, "repo": {"mode": "repo", "uniform": "skip"}, "variance": {"mode": "variance", "uniform": "center"},
                         "stable-reinforce": {"mode": "off", "normalize": "batch", "sigma_filter": 3.0}}.items():
        thinking = torch.empty(4096, 8, device="meta") if name == "variance" else torch.empty(4096, device="meta")
        for launch in plan(outcome, thinking, bounds, **base | change)[0]:
            found.append(Shipped.of(f"trust_advantage/{launch.kernel.__name__}/{name}", launch, occupancy=2))
    return found
