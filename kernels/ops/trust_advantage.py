"""The statistics of Trust-GRPO: trust weight, reward and advantage of every response, over ragged groups."""
from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from . import coefficients
from .checks import INTEGERS, expect, expect_boundaries, expect_choice, expect_flags, expect_number, expect_tensor, reads_contents
from .coefficients import Coefficient
from .dispatch import WISHES, load, resolve

COEFFICIENTS = ("alpha", "anneal", "threshold", "sigma_filter")  # in the order of the bits of ON_DEVICE
Mode = Literal["paper", "repo", "variance", "off"]
Uniform = Literal["score", "center", "skip"]
Normalize = Literal["std", "mean", "batch", "none"]
ROUNDING = 1e-6  # what fp32 means of scores may lie outside of [0, 1] by
MODES, UNIFORM, NORMALIZE = get_args(Mode), get_args(Uniform), get_args(Normalize)


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
    alpha: Coefficient = 0.3,
    anneal: Coefficient = 1.0,
    threshold: Coefficient = 0.5,
    mode: Mode = "paper",
    uniform: Uniform = "score",
    quorum: float = 1.0,
    normalize: Normalize = "std",
    sigma_filter: Coefficient | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
    debug: bool = False,
) -> Trust:
    """reward = outcome + gamma alpha anneal thinking, and its advantage (SophiaVL-R1, arXiv 2505.17018, sec. 3.4).

    outcome   [B] fp32 or fp64; at or above `threshold` counts as correct
    thinking  [B] or [B, K] scores in [0, 1]; NaN: not scored. Of K scores the mean counts, and any NaN makes it NaN. Others are
              refused (but for a rounding of 1e-6) where contents are read; on a GPU they would count as they are
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
    debug     read contents (boundaries, scores, finite outcomes, coefficients) on a GPU too, at the cost of a sync

    Coefficients are floats or 0-d tensors on the device. Results are constants to autograd, and inputs that require a gradient
    while it is recorded are refused: detach them. Raises ValueError naming the argument, its value and what was expected.
    """
    expect_flags(debug=debug)
    for name, choice, choices in (("backend", backend, WISHES), ("mode", mode, MODES), ("uniform", uniform, UNIFORM), ("normalize", normalize, NORMALIZE)):
        expect_choice(name, choice, choices)
    _check_tensors(outcome, thinking, cu_groups, mode, debug)
    device, given = outcome.device, {"alpha": alpha, "anneal": anneal, "threshold": threshold, "sigma_filter": sigma_filter}
    for name in ("alpha", "anneal", "threshold"):
        expect_number(name, given[name], device, debug=debug)
    expect(sigma_filter is None or normalize == "batch", "sigma_filter", sigma_filter, f"None with normalize={normalize!r}")
    expect_number("sigma_filter", sigma_filter, device, above=0.0, finite=False, optional=True, debug=debug)
    expect_number("quorum", quorum, above=0.0)
    expect(quorum <= 1, "quorum", quorum, "a share in (0, 1]")
    expect_number("eps", eps, least=0.0)
    return Trust(*torch.ops.sophiavl.trust_advantage(outcome.detach(), thinking.detach(), cu_groups, *coefficients.encode(COEFFICIENTS, given), mode, uniform,
                                                     quorum, normalize, eps, backend))


def _check_tensors(outcome: Tensor, thinking: Tensor, cu_groups: Tensor, mode: str, debug: bool) -> None:
    expect_tensor("outcome", outcome, ("B",), (torch.float32, torch.float64))
    rows, device = len(outcome), outcome.device
    flat = not isinstance(thinking, Tensor) or thinking.dim() == 1
    expect_tensor("thinking", thinking, (rows,) if flat else (rows, "K"), (torch.float32, outcome.dtype), device)
    expect_tensor("cu_groups", cu_groups, ("G+1",), INTEGERS, device)
    expect(len(cu_groups) > 0, "cu_groups", "an empty tensor", "G + 1 boundaries")
    scores = 1 if flat else thinking.shape[1]
    expect(scores > (mode == "variance"), "thinking", f"{scores} score(s) a response", f"[B, K] with K > 1 for mode={mode!r}" if scores else "K >= 1")
    if reads_contents(outcome, debug):
        expect_boundaries("cu_groups", cu_groups, rows)
        beyond = thinking[(thinking < -ROUNDING) | (thinking > 1 + ROUNDING)]
        expect(not beyond.numel(), "thinking", beyond[:1].tolist(), "scores in [0, 1], or NaN where there is none")
        expect(bool(outcome.isfinite().all()), "outcome", outcome.tolist(), "finite values")


_SCHEMA = (f"(Tensor outcome, Tensor thinking, Tensor cu_groups, {coefficients.schema(COEFFICIENTS)}, "
           "str mode, str uniform, float quorum, str normalize, float eps, str backend) -> (Tensor, Tensor, Tensor, Tensor)")


@torch.library.custom_op("sophiavl::trust_advantage", mutates_args=(), schema=_SCHEMA)
def _op(outcome, thinking, cu_groups, kinds, numbers, alpha, anneal, threshold, sigma_filter, mode, uniform, quorum, normalize, eps, backend):
    """(advantage, reward, gamma, used): constants to autograd. A coefficient is, by its letter in `kinds`, a number, a tensor or absent."""
    module = load("trust_advantage", resolve("trust_advantage", backend, outcome.device, outcome.dtype))
    given = coefficients.decode(COEFFICIENTS, kinds, numbers, (alpha, anneal, threshold, sigma_filter))
    return module.forward(outcome, thinking, cu_groups, mode=mode, uniform=uniform, quorum=quorum, normalize=normalize, eps=eps, **given)


@_op.register_fake
def _(outcome, *_):
    like = lambda dtype: torch.empty(outcome.shape, dtype=dtype, device=outcome.device)
    return like(torch.float32), like(torch.float32), like(torch.float32), like(torch.bool)
