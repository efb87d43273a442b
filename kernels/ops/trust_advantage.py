"""The statistics of Trust-GRPO: trust weight, reward and advantage of every response, over ragged groups."""
from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .checks import FLOATS, INTEGERS, expect, expect_boundaries, expect_choice, expect_tensor, reads_contents
from .dispatch import load, resolve


class Trust(NamedTuple):
    """Rows in the order of the responses, all [B]: advantage, reward, gamma fp32 and used bool.

    used: the thinking term entered the reward; gamma: the trust weight that was applied, NaN where none was.
    """

    advantage: Tensor
    reward: Tensor
    gamma: Tensor
    used: Tensor


def trust_advantage(
    outcome: Tensor,
    thinking: Tensor,
    cu_groups: Tensor,
    *,
    alpha: float | Tensor = 0.3,
    anneal: float | Tensor = 1.0,
    threshold: float | Tensor = 0.5,
    mode: Literal["paper", "repo", "variance", "off"] = "paper",
    uniform: Literal["score", "center", "skip"] = "score",
    quorum: float = 1.0,
    normalize: Literal["std", "mean", "batch", "none"] = "std",
    sigma_filter: float | Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
    debug: bool = False,
) -> Trust:
    """reward = outcome + gamma alpha anneal thinking, and its advantage (SophiaVL-R1, arXiv 2505.17018, sec. 3.4).

    outcome   [B] fp32 or fp64; at or above `threshold` counts as correct
    thinking  [B] or [B, K] scores in [0, 1]; NaN: not scored. Of K scores the mean counts, and any NaN makes it NaN
    cu_groups [G+1] int64 or int32 boundaries of the groups, whose responses lie side by side
    mode      paper: gamma = exp(min(0, mean thinking of the correct - of the wrong)) a group, 1 where a side is empty
              repo: as the public code: outcomes below 0.2 have thinking 0 unasked, groups with all outcomes >= 0.9 or
              all <= 0.1 no thinking term, and gamma is 1 where no response is correct
              variance: gamma = exp(-population variance of the K scores), one a response (App. E; K > 1)
              off: gamma = 1
    quorum    share of a group's asked scores that must be there. Below it the group's thinking term is dropped; else those
              not scored take the mean thinking term of the scored, which pushes neither way, and stay out of gamma
    normalize std: (r - mean) / (unbiased std + eps) of the group, 0 where max = min; mean: r - mean; none: r;
              batch: (r - mean) / (unbiased std + eps) over all B, 0 where max = min
    sigma_filter with batch: advantages beyond this are 0 (StableReinforce, arXiv 2505.02835, eq. 5)
    uniform   groups whose outcomes are all equal: score: as any other; center: r - mean of the group; skip: 0
    debug     read contents (boundaries, finite outcomes) on a GPU too, at the cost of a sync

    Coefficients are floats or 0-d tensors on the device. Raises ValueError naming the argument, its value and what was expected.
    """
    expect_tensor("outcome", outcome, ("B",), (torch.float32, torch.float64), outcome.device)
    rows, device = len(outcome), outcome.device
    expect(isinstance(thinking, Tensor), "thinking", type(thinking).__name__, "a tensor")
    kinds = (torch.float32, outcome.dtype)
    expect_tensor("thinking", thinking, (rows,) if thinking.dim() == 1 else (rows, "K"), kinds, device)
    expect_tensor("cu_groups", cu_groups, ("G+1",), INTEGERS, device)
    expect(len(cu_groups) > 0, "cu_groups", "an empty tensor", "G + 1 boundaries")
    for name, value, choices in (("mode", mode, ("paper", "repo", "variance", "off")), ("uniform", uniform, ("score", "center", "skip")),
                                 ("normalize", normalize, ("std", "mean", "batch", "none"))):
        expect_choice(name, value, choices)
    scores = 1 if thinking.dim() == 1 else thinking.shape[1]
    expect(scores > (mode == "variance"), "thinking", f"{scores} score(s) a response", f"[B, K] with K > 1 for mode={mode!r}" if scores else "K >= 1")
    expect(0 < quorum <= 1, "quorum", quorum, "a share in (0, 1]")
    expect(eps >= 0, "eps", eps, "a value of at least 0")
    expect(sigma_filter is None or normalize == "batch", "sigma_filter", sigma_filter, f"None with normalize={normalize!r}")
    coefficients = {"alpha": alpha, "anneal": anneal, "threshold": threshold} | ({} if sigma_filter is None else {"sigma_filter": sigma_filter})
    for name, value in coefficients.items():
        if isinstance(value, Tensor):
            expect_tensor(name, value, (), FLOATS, device)
    if reads_contents(outcome, debug):
        for name, value in coefficients.items():
            expect(isinstance(value, Tensor | float | int) and math.isfinite(value), name, value, "a finite number or a 0-d tensor of one")
        expect(sigma_filter is None or float(sigma_filter) > 0, "sigma_filter", sigma_filter, "a value above 0, or None")
        expect_boundaries("cu_groups", cu_groups, rows)
        expect(not bool(thinking.isinf().any()), "thinking", thinking.tolist(), "scores in [0, 1], or NaN")
        expect(bool(outcome.isfinite().all()), "outcome", outcome.tolist(), "finite values")
    values = (alpha, anneal, threshold, sigma_filter)
    kinds = "".join("-" if v is None else "t" if isinstance(v, Tensor) else "n" for v in values)
    numbers = [0.0 if v is None or isinstance(v, Tensor) else float(v) for v in values]
    tensors = [v if isinstance(v, Tensor) else None for v in values]
    return Trust(*torch.ops.sophiavl.trust_advantage(outcome.detach(), thinking.detach(), cu_groups, kinds, numbers, *tensors, mode, uniform, quorum,
                                                     normalize, eps, backend))


_COEFFICIENTS = ("alpha", "anneal", "threshold", "sigma_filter")
_SCHEMA = ("(Tensor outcome, Tensor thinking, Tensor cu_groups, str kinds, float[] numbers, " + "".join(f"Tensor? {name}, " for name in _COEFFICIENTS)
           + "str mode, str uniform, float quorum, str normalize, float eps, str backend) -> (Tensor, Tensor, Tensor, Tensor)")


@torch.library.custom_op("sophiavl::trust_advantage", mutates_args=(), schema=_SCHEMA)
def _op(outcome, thinking, cu_groups, kinds, numbers, alpha, anneal, threshold, sigma_filter, mode, uniform, quorum, normalize, eps, backend):
    """(advantage, reward, gamma, used): constants to autograd. A coefficient is, by its letter in `kinds`, a number, a tensor or absent."""
    module = load("trust_advantage", resolve("trust_advantage", backend, outcome.device, outcome.dtype))
    tensors = (alpha, anneal, threshold, sigma_filter)
    given = {name: {"-": None, "n": n, "t": t}[kind] for name, kind, n, t in zip(_COEFFICIENTS, kinds, numbers, tensors, strict=True)}
    return module.forward(outcome, thinking, cu_groups, mode=mode, uniform=uniform, quorum=quorum, normalize=normalize, eps=eps, **given)


@_op.register_fake
def _(outcome, *_):
    like = lambda dtype: torch.empty(outcome.shape, dtype=dtype, device=outcome.device)
    return like(torch.float32), like(torch.float32), like(torch.float32), like(torch.bool)
