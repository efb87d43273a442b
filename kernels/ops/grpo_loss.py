"""The GRPO family's policy loss over packed responses, with its statistics."""
from __future__ import annotations

import torch
from torch import Tensor

from .checks import INTEGERS, expect, expect_boundaries, expect_choice, expect_flags, expect_number, expect_tensor, reads_contents
from .coefficients import Coefficient
from .dispatch import WISHES
from .loss_ops import CHOICES, Aggregate, Kl, Ratio, Variant, loss

# Range of each coefficient: infinite clips and caps never act, which is legal; whatever multiplies or divides must be finite.
_AT_LEAST_0 = {"clip_low": False, "clip_high": False, "kl_coef": True, "entropy_coef": True}  # name: finite
_ABOVE = {"dual_clip": (1.0, False), "pre_clip": (0.0, False), "tis_cap": (0.0, False), "max_length": (0.0, True), "denominator": (0.0, True)}


def grpo_loss(
    logprob: Tensor,
    advantage: Tensor,
    cu_seqlens: Tensor,
    *,
    old_logprob: Tensor | None = None,
    mask: Tensor | None = None,
    denominator: Coefficient | None = None,
    variant: Variant = "ppo",
    ratio: Ratio = "token",
    aggregate: Aggregate = "token",
    max_length: Coefficient | None = None,
    clip_low: Coefficient = 0.2,
    clip_high: Coefficient = 0.2,
    dual_clip: Coefficient | None = None,
    pre_clip: Coefficient | None = None,
    ref_logprob: Tensor | None = None,
    kl: Kl = "k3",
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
    denominator     global count that the sum is divided by: tokens, responses (sequence, constant); finite
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

    Coefficients are floats or 0-d tensors on the device (ranges of tensors are checked where contents are read). Returns (loss,
    0-d, differentiable in logprob and entropy; statistics [K] fp32, slots named by STATS). Raises ValueError naming the argument,
    its value and what was expected.

    Where exp overflows (differences of 88 nats and more in fp32): what has no weight adds exactly 0 to loss and gradient, be the
    rest inf or NaN: an advantage of 0, a coefficient of 0, a truncated importance weight of 0. Elsewhere a ratio of inf is
    clipped as any other: A > 0 gives -clip(r) A and no gradient, A < 0 inf in both unless dual_clip or pre_clip holds it, cispo
    its bounded weight; the weight of tis_cap saturates at the cap; k3 and its gradient are inf. Statistics say what was there.

    First derivatives by torch.autograd only: differentiating the gradient again is a RuntimeError (under torch.compile PyTorch
    itself drops second derivatives of most ops); tangents, torch.func transforms, and other inputs that require a gradient while
    it is recorded, are a ValueError: detach them.
    """
    options = {
        "old_logprob": old_logprob, "mask": mask, "denominator": denominator, "variant": variant, "ratio": ratio, "aggregate": aggregate,
        "max_length": max_length, "clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip, "pre_clip": pre_clip, "ref_logprob": ref_logprob,
        "kl": kl, "kl_coef": kl_coef, "rollout_logprob": rollout_logprob, "tis_cap": tis_cap, "mismatch_mask": mismatch_mask, "entropy": entropy,
        "entropy_coef": entropy_coef,
    }
    expect_flags(debug=debug)
    expect_choice("backend", backend, WISHES)
    _check_tensors(logprob, advantage, cu_seqlens, options, debug)
    _check_options(options, logprob.device, debug)
    return loss(logprob, advantage, cu_seqlens, backend=backend, **options)


def _check_tensors(logprob: Tensor, advantage: Tensor, bounds: Tensor, o: dict, debug: bool) -> None:
    expect_tensor("logprob", logprob, ("T",), (torch.float32, torch.float64), differentiable=True)
    device, tokens, dtype = logprob.device, logprob.shape[0], (torch.float32, logprob.dtype)
    expect_tensor("cu_seqlens", bounds, ("B+1",), INTEGERS, device)
    expect(len(bounds) > 0, "cu_seqlens", "an empty tensor", "B + 1 boundaries")
    rows = len(bounds) - 1
    _expect_rows("advantage", advantage, rows, tokens, dtype, device)
    for name in ("old_logprob", "ref_logprob", "rollout_logprob", "entropy"):
        if o[name] is not None:
            expect_tensor(name, o[name], (tokens,), dtype, device, differentiable=name == "entropy")
    if o["mask"] is not None:
        expect_tensor("mask", o["mask"], (tokens,), (torch.bool,), device)
    if o["mismatch_mask"] is not None:
        _expect_rows("mismatch_mask", o["mismatch_mask"], rows, tokens, (torch.bool,), device)
    if reads_contents(bounds, debug):
        expect_boundaries("cu_seqlens", bounds, tokens)


def _expect_rows(name: str, tensor: Tensor, rows: int, tokens: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    expect_tensor(name, tensor, ("B or T",), dtypes, device)
    expect(len(tensor) in (rows, tokens), name, f"a tensor of shape [{len(tensor)}]", f"shape [{rows}], one a response, or [{tokens}], one a token")


def _check_options(o: dict, device: torch.device, debug: bool) -> None:
    for name, choices in CHOICES.items():
        expect_choice(name, o[name], choices)
    for name, finite in _AT_LEAST_0.items():
        expect_number(name, o[name], device, least=0.0, finite=finite, debug=debug)
    for name, (low, finite) in _ABOVE.items():
        expect_number(name, o[name], device, above=low, finite=finite, optional=True, debug=debug)
    expect((o["max_length"] is not None) == (o["aggregate"] == "constant"), "max_length", o["max_length"], "a length with aggregate='constant', else None")
    expect(o["dual_clip"] is None or o["variant"] == "ppo", "dual_clip", o["dual_clip"], "None with variant='cispo'")
    for coefficient, source in (("kl_coef", "ref_logprob"), ("entropy_coef", "entropy"), ("tis_cap", "rollout_logprob")):
        wanted = o[coefficient] is not None and (isinstance(o[coefficient], Tensor) or o[coefficient] != 0)
        expect(not wanted or o[source] is not None, source, None, f"a tensor [T], since {coefficient} is set")
