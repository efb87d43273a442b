"""grpo_loss as torch.library knows it: one op that computes loss, statistics and both gradients; its backward pass only scales them."""
from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from . import coefficients
from .dispatch import load, resolve
from .first_order import once
from .stats import STATS

TENSORS = ("old_logprob", "mask", "ref_logprob", "rollout_logprob", "mismatch_mask", "entropy")
COEFFICIENTS = ("denominator", "max_length", "clip_low", "clip_high", "dual_clip", "pre_clip", "kl_coef", "tis_cap", "entropy_coef")
Variant = Literal["ppo", "cispo"]
Ratio = Literal["token", "sequence"]
Aggregate = Literal["token", "sequence", "constant"]
Kl = Literal["k1", "k2", "k3"]
CHOICES: dict[str, tuple[str, ...]] = {name: get_args(kind) for name, kind in (("variant", Variant), ("ratio", Ratio), ("aggregate", Aggregate), ("kl", Kl))}
_OPTIONAL = ", ".join(f"Tensor? {name}" for name in TENSORS)
_OPTIONS = ", ".join([*(f"str {name}" for name in CHOICES), "bool gradient", "bool entropy_gradient", "str backend"])
_SCHEMA = (f"(Tensor logprob, Tensor advantage, Tensor cu_seqlens, {_OPTIONAL}, {coefficients.schema(COEFFICIENTS)}, {_OPTIONS})"
           " -> (Tensor, Tensor, Tensor, Tensor)")


def loss(logprob: Tensor, advantage: Tensor, cu_seqlens: Tensor, *, backend: str, **o: Any) -> tuple[Tensor, Tensor]:
    """(loss, stats [K]), the loss differentiable in logprob and entropy. Gradients are computed only where they are asked for."""
    recording, entropy = torch.is_grad_enabled(), o["entropy"]
    bonus = isinstance(o["entropy_coef"], Tensor) or o["entropy_coef"] != 0
    gradient = recording and logprob.requires_grad
    entropy_gradient = recording and entropy is not None and entropy.requires_grad and bonus
    if entropy is not None and not entropy_gradient:
        entropy = entropy.detach()  # a statistic: autograd never visits it, which spares the log-prob's backward pass half its work
    optional = [entropy if name == "entropy" else o[name] for name in TENSORS]
    value, stats, _, _ = torch.ops.sophiavl.grpo_loss(
        logprob, advantage, cu_seqlens, *optional, *coefficients.encode(COEFFICIENTS, o), *[o[name] for name in CHOICES], gradient, entropy_gradient, backend)
    return value, stats


@torch.library.custom_op("sophiavl::grpo_loss", mutates_args=(), schema=_SCHEMA)
def grpo_loss(logprob, advantage, cu_seqlens, old_logprob, mask, ref_logprob, rollout_logprob, mismatch_mask, entropy, kinds, numbers, *rest):
    """(loss, stats [K], d loss / d logprob, d loss / d entropy); a gradient that was not asked for is an empty tensor."""
    tensors, (variant, ratio, aggregate, kl, gradient, entropy_gradient, backend) = rest[:len(COEFFICIENTS)], rest[len(COEFFICIENTS):]
    module = load("grpo_loss", resolve("grpo_loss", backend, logprob.device, logprob.dtype))
    value, stats, d_logprob, d_entropy = module.forward(
        logprob, advantage, cu_seqlens, old_logprob=old_logprob, mask=mask, ref_logprob=ref_logprob, rollout_logprob=rollout_logprob,
        mismatch_mask=mismatch_mask, entropy=entropy, variant=variant, ratio=ratio, aggregate=aggregate, kl=kl, gradient=gradient,
        entropy_gradient=entropy_gradient, **coefficients.decode(COEFFICIENTS, kinds, numbers, tensors))
    empty = lambda: logprob.new_empty(0)
    return value, stats, empty() if d_logprob is None else d_logprob, empty() if d_entropy is None else d_entropy


@grpo_loss.register_fake
def _(logprob, advantage, cu_seqlens, old_logprob, mask, ref_logprob, rollout_logprob, mismatch_mask, entropy, kinds, numbers, *rest):
    *_, gradient, entropy_gradient, _ = rest
    like = lambda x, wanted: torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else logprob.new_empty(0)
    return logprob.new_empty(()), logprob.new_empty(len(STATS), dtype=torch.float32), like(logprob, gradient), like(entropy, entropy_gradient)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.place, ctx.wants = 3 + TENSORS.index("entropy"), (inputs[-3], inputs[-2])
    # The inputs for `once` alone: they are no bytes of ours.
    ctx.save_for_backward(inputs[0], inputs[ctx.place] if ctx.wants[1] else None, *output[2:])
    ctx.arguments = len(inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * ctx.arguments
    if grad_loss is not None:
        logprob, entropy, *found = ctx.saved_tensors
        scaled = [grad_loss.detach() * x if wanted else None for x, wanted in zip(found, ctx.wants, strict=True)]
        grads[0], grads[ctx.place] = once("grpo_loss", scaled, (logprob, entropy, grad_loss))
    return tuple(grads)


grpo_loss.register_autograd(_backward, setup_context=_save)
