"""The GRPO family's policy loss over packed responses, with its statistics."""
from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .checks import INTEGERS, expect, expect_boundaries, expect_choice, expect_tensor, reads_contents
from .loss_ops import loss

Coefficient = float | Tensor


def grpo_loss(
    logprob: Tensor,
    advantage: Tensor,
    cu_seqlens: Tensor,
    *,
    old_logprob: Tensor | None = None,
    mask: Tensor | None = None,
    denominator: Coefficient | None = None,
    variant: Literal["ppo", "cispo"] = "ppo",
    ratio: Literal["token", "sequence"] = "token",
    aggregate: Literal["token", "sequence", "constant"] = "token",
    max_length: Coefficient | None = None,
    clip_low: Coefficient = 0.2,
    clip_high: Coefficient = 0.2,
    dual_clip: Coefficient | None = None,
    pre_clip: Coefficient | None = None,
    ref_logprob: Tensor | None = None,
    kl: Literal["k1", "k2", "k3"] = "k3",
    kl_coef: Coefficient = 0.0,
    rollout_logprob: Tensor | None = None,
    tis_cap: Coefficient | None = None,
    mismatch_mask: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: Coefficient = 0.0,
    backend: str = "auto",
    debug: bool = False,
) -> tuple[Tensor, Tensor]:
    """-sum_t w_t min(r A, clip(r) A) + KL - entropy over the T tokens of B packed responses; what is masked never leaks.

    logprob         [T] fp32 (fp64 computes in fp64: for oracles) of the policy, differentiable
    advantage       [B], one a response, or [T], one a token (where B = T the first reading holds)
    cu_seqlens      [B+1] int64 or int32 boundaries of the responses; empty responses are legal
    old_logprob     [T] of the policy that the ratio is taken against; None: logprob detached (ratio 1)
    mask            [T] bool, False: the token does not count
    denominator     global count that the sum is divided by: tokens, responses (sequence, constant)
    variant         ppo: clipped ratio; cispo: -stop_gradient(clip(r)) A logprob (MiniMax-M1, arXiv 2506.13585, eq. 4)
    ratio           token: r_t = exp(logprob_t - old_t); sequence: exp of their mean over the response (GSPO, arXiv 2507.18071, eq. 7)
    aggregate       w_t = 1 | 1 / counting tokens of the response | 1 / max_length (Dr. GRPO, arXiv 2503.20783)
    dual_clip       with A < 0 the loss is at most dual_clip |A| (arXiv 1912.09729); > 1, ppo only
    pre_clip        the log-ratio is clamped to +-pre_clip before exp, with no gradient outside (StableReinforce, arXiv 2505.02835)
    ref_logprob     [T] of the reference; kl: with d = ref - new, k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1
    rollout_logprob [T] of the engine: statistics, and with tis_cap the policy term's weight min(exp(old - rollout), tis_cap)
    mismatch_mask   [T] or [B] bool, False: no loss, no gradient and no part in a sequence's ratio; w_t still counts the token,
                    since the denominator was fixed before
    entropy         [T], its gradient enters with -entropy_coef
    debug           read contents (boundaries) on a GPU too, at the cost of a sync

    Coefficients are floats or 0-d tensors on the device. Returns (loss, 0-d, differentiable in logprob and entropy;
    statistics [K] fp32, slots named by STATS). Raises ValueError naming the argument, its value and what was expected.
    """
    options = {
        "old_logprob": old_logprob, "mask": mask, "denominator": denominator, "variant": variant, "ratio": ratio, "aggregate": aggregate,
        "max_length": max_length, "clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip, "pre_clip": pre_clip, "ref_logprob": ref_logprob,
        "kl": kl, "kl_coef": kl_coef, "rollout_logprob": rollout_logprob, "tis_cap": tis_cap, "mismatch_mask": mismatch_mask, "entropy": entropy,
        "entropy_coef": entropy_coef,
    }
    _check_tensors(logprob, advantage, cu_seqlens, options, debug)
    _check_options(options, logprob.device)
    return loss(logprob, advantage, cu_seqlens, backend=backend, **options)


def _check_tensors(logprob: Tensor, advantage: Tensor, bounds: Tensor, o: dict, debug: bool) -> None:
    expect_tensor("logprob", logprob, ("T",), (torch.float32, torch.float64), logprob.device)
    device, tokens, dtype = logprob.device, logprob.shape[0], (torch.float32, logprob.dtype)
    expect_tensor("cu_seqlens", bounds, ("B+1",), INTEGERS, device)
    expect(len(bounds) > 0, "cu_seqlens", "an empty tensor", "B + 1 boundaries")
    rows = len(bounds) - 1
    _expect_rows("advantage", advantage, rows, tokens, dtype, device)
    for name in ("old_logprob", "ref_logprob", "rollout_logprob", "entropy"):
        if o[name] is not None:
            expect_tensor(name, o[name], (tokens,), dtype, device)
    if o["mask"] is not None:
        expect_tensor("mask", o["mask"], (tokens,), (torch.bool,), device)
    if o["mismatch_mask"] is not None:
        _expect_rows("mismatch_mask", o["mismatch_mask"], rows, tokens, (torch.bool,), device)
    if reads_contents(bounds, debug):
        expect_boundaries("cu_seqlens", bounds, tokens)


def _expect_rows(name: str, tensor: Tensor, rows: int, tokens: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    expect_tensor(name, tensor, ("B or T",), dtypes, device)
    expect(len(tensor) in (rows, tokens), name, f"a tensor of shape [{len(tensor)}]", f"shape [{rows}], one a response, or [{tokens}], one a token")


def _check_options(o: dict, device: torch.device) -> None:
    expect_choice("variant", o["variant"], ("ppo", "cispo"))
    expect_choice("ratio", o["ratio"], ("token", "sequence"))
    expect_choice("aggregate", o["aggregate"], ("token", "sequence", "constant"))
    expect_choice("kl", o["kl"], ("k1", "k2", "k3"))
    for name in ("clip_low", "clip_high", "entropy_coef", "kl_coef", "dual_clip", "pre_clip", "tis_cap", "max_length", "denominator"):
        optional = name not in ("clip_low", "clip_high", "entropy_coef", "kl_coef")
        if not (isinstance(o[name], Tensor | float | int) or (optional and o[name] is None)):
            expect(False, name, repr(o[name]), "a float or a 0-d tensor" + ", or None" * optional)
    for name, low in (("clip_low", 0.0), ("clip_high", 0.0), ("entropy_coef", 0.0), ("kl_coef", 0.0)):
        expect(isinstance(o[name], Tensor) or o[name] >= low, name, o[name], f"a value of at least {low:g}")
    for name, low in (("dual_clip", 1.0), ("pre_clip", 0.0), ("tis_cap", 0.0), ("max_length", 0.0), ("denominator", 0.0)):
        expect(o[name] is None or isinstance(o[name], Tensor) or o[name] > low, name, o[name], f"None or a value above {low:g}")
    for name in ("clip_low", "clip_high", "entropy_coef", "kl_coef", "dual_clip", "pre_clip", "tis_cap", "max_length", "denominator"):
        if isinstance(o[name], Tensor):
            expect_tensor(name, o[name], (), (torch.float32, torch.float64, torch.int64, torch.int32), device)
    expect((o["max_length"] is not None) == (o["aggregate"] == "constant"), "max_length", o["max_length"], "a length with aggregate='constant', else None")
    expect(o["dual_clip"] is None or o["variant"] == "ppo", "dual_clip", o["dual_clip"], "None with variant='cispo'")
    for coefficient, source in (("kl_coef", "ref_logprob"), ("entropy_coef", "entropy"), ("tis_cap", "rollout_logprob")):
        wanted = o[coefficient] is not None and (isinstance(o[coefficient], Tensor) or o[coefficient] != 0)
        expect(not wanted or o[source] is not None, source, None, f"a tensor [T], since {coefficient} is set")
