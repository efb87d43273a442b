"""The log-prob ops as torch.library knows them: autograd, fake tensors and autocast are written here once, above the backends.

Three ops in the namespace `sophiavl`, so that collectives stay outside of any registered op:

    statistics = logprob_statistics(hidden, ...)          [4, T] of this rank's shard
    whole      = vocabulary.combine(statistics, group)    plain PyTorch: one all-gather
    results    = logprob_attach(hidden, ..., whole)       hands `whole` on, and carries the gradient formula

whose backward pass calls logprob_gradients (or logits_gradients_, in place). A caller that needs no gradient stops after `combine`.
weight None: `hidden` holds the logits themselves. What an op would return as None is an empty tensor, since schemas know no optional result.
"""
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .dispatch import load, resolve
from .first_order import once
from .vocabulary import IGNORE, Shard, Whole, combine, wide

# tau is the temperature where it is a tensor, temperature where it is a number.
_COMMON = "Tensor? tau, float temperature, int valid, SymInt chunk, str backend"
_SHARD = "Tensor hidden, Tensor? weight, Tensor? bias, Tensor column, Tensor here"
_WHOLE = "Tensor live, Tensor top, Tensor total, Tensor logprob, Tensor entropy"


def logprob(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, target: Tensor, shard: Shard, *, temperature: float | Tensor, entropy: bool,
    active: Tensor | None, main_grad: Tensor | None, chunk: int, backend: str, inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(logprob [T], entropy [T] or None) of the whole vocabulary, differentiable in hidden, weight and bias."""
    tau, number = (temperature, 1.0) if isinstance(temperature, Tensor) else (None, float(temperature))
    common = (tau, number, shard.valid, chunk, backend)
    column, here = shard.locate(target)
    with torch.no_grad():
        whole = combine(torch.ops.sophiavl.logprob_statistics(hidden, weight, bias, column, here, entropy, *common), shard.group)
        live = target != IGNORE
        whole = Whole(whole.logprob.where(live, 0), whole.entropy.where(live, 0), whole.top, whole.total)
    value, spread = whole.logprob, whole.entropy
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
        # An infinite maximum makes every probability of an ignored row 0, whatever the row holds.
        value, spread = torch.ops.sophiavl.logprob_attach(
            hidden, weight, bias, column, here & live, live, whole.top.where(live, torch.inf), whole.total.where(live, 1), value, spread, active, main_grad,
            entropy, inplace, *common)
    return value, spread if entropy else None


@torch.library.custom_op("sophiavl::logprob_statistics", mutates_args=(), schema=f"({_SHARD}, bool entropy, {_COMMON}) -> Tensor")
def logprob_statistics(hidden, weight, bias, column, here, entropy, tau, temperature, valid, chunk, backend):
    """[4, T] of `vocabulary.shard_statistics`."""
    module = _backend(hidden, weight, backend)
    with _as_given(hidden):
        return module.statistics(hidden, weight, bias, column, here, valid=valid, temperature=_first(tau, temperature), entropy=entropy, chunk=chunk)


@logprob_statistics.register_fake
def _(hidden, weight, bias, column, here, entropy, tau, temperature, valid, chunk, backend):
    return hidden.new_empty(4, hidden.shape[0], dtype=wide(hidden.dtype))


@torch.library.custom_op("sophiavl::logprob_gradients", mutates_args=("main_grad",), schema=f"({_SHARD}, {_WHOLE}, Tensor g, Tensor? h, Tensor? active, "
                         f"Tensor(a!)? main_grad, bool wants_hidden, bool wants_weight, bool wants_bias, {_COMMON}) -> (Tensor, Tensor, Tensor)")
def logprob_gradients(hidden, weight, bias, column, here, live, top, total, logprob, entropy, g, h, active, main_grad, wants_hidden, wants_weight, wants_bias,
                      tau, temperature, valid, chunk, backend):
    """Gradients of hidden (this rank's part), weight (empty where main_grad takes it) and bias; empty where not wanted."""
    module = _backend(hidden, weight, backend)
    with _as_given(hidden):
        found = module.gradients(
            hidden, weight, bias, column, here, live, top, total, logprob, entropy, g, h, valid=valid, temperature=_first(tau, temperature), active=active,
            wants=(wants_hidden, wants_weight, wants_bias), main_grad=main_grad, chunk=chunk)
    return tuple(hidden.new_empty(0) if x is None else x for x in found)


@logprob_gradients.register_fake
def _(hidden, weight, bias, column, here, live, top, total, logprob, entropy, g, h, active, main_grad, wants_hidden, wants_weight, wants_bias,
      tau, temperature, valid, chunk, backend):
    like = lambda x, wanted: torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else hidden.new_empty(0)
    return like(hidden, wants_hidden), like(weight, wants_weight and main_grad is None), like(bias, wants_bias)


@torch.library.custom_op("sophiavl::logits_gradients_", mutates_args=("logits",), schema="(Tensor(a!) logits, Tensor column, Tensor here, "
                         f"{_WHOLE}, Tensor g, Tensor? h, {_COMMON}) -> ()")
def logits_gradients_(logits, column, here, live, top, total, logprob, entropy, g, h, tau, temperature, valid, chunk, backend):
    """The logits become their own gradient."""
    with _as_given(logits):
        _backend(logits, None, backend).gradients(
            logits, None, None, column, here, live, top, total, logprob, entropy, g, h, valid=valid, temperature=_first(tau, temperature), active=None,
            wants=(True, False, False), main_grad=None, chunk=chunk, inplace=True)


@logits_gradients_.register_fake
def _(logits, column, here, live, top, total, logprob, entropy, g, h, tau, temperature, valid, chunk, backend):
    return None


@torch.library.custom_op("sophiavl::logprob_attach", mutates_args=(), schema=f"({_SHARD}, {_WHOLE}, Tensor? active, Tensor? main_grad, bool with_entropy, "
                         f"bool inplace, {_COMMON}) -> (Tensor, Tensor)")
def logprob_attach(hidden, weight, bias, column, here, live, top, total, logprob, entropy, active, main_grad, with_entropy, inplace,
                   tau, temperature, valid, chunk, backend):
    """logprob and entropy as they are; the gradient of both is attached to hidden, weight and bias."""
    return logprob.clone(), entropy.clone()


@logprob_attach.register_fake
def _(hidden, weight, bias, column, here, live, top, total, logprob, entropy, *_):
    return torch.empty_like(logprob), torch.empty_like(entropy)


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    *saved, active, main_grad, with_entropy, inplace, tau, temperature, valid, chunk, backend = inputs
    ctx.save_for_backward(*saved, active, tau)
    # Not a saved tensor: other micro-batches add to main_grad before this one's backward pass, and autograd would take that for damage.
    ctx.main_grad = main_grad
    ctx.with_entropy, ctx.inplace, ctx.spent, ctx.rest = with_entropy, inplace, False, (temperature, valid, chunk, backend)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.spent:
        raise RuntimeError("logits_logprob(inplace=True): a second backward pass, but the first has turned the logits into their gradient")
    saved = ctx.saved_tensors  # once: activation checkpointing refuses a second look
    with torch.no_grad():
        found = _gradients(ctx, saved, grad_logprob, grad_entropy)
    hidden, weight, bias = saved[:3]
    op = "logits_logprob" if weight is None else "linear_logprob"
    return *once(op, found, (hidden, weight, bias, grad_logprob, grad_entropy)), *[None] * 16


def _gradients(ctx: Any, saved: tuple, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of hidden, weight and bias, None where not wanted."""
    hidden, weight, bias, column, here, live, top, total, logprob, entropy, active, tau = saved
    temperature = _first(tau, ctx.rest[0])
    g = torch.zeros_like(logprob) if grad_logprob is None else grad_logprob.where(live, 0) / temperature
    h = None if grad_entropy is None or not ctx.with_entropy else grad_entropy.where(live, 0) / temperature
    whole, common = (column, here, live, top, total, logprob, entropy, g, h), (tau, *ctx.rest)
    if ctx.inplace:
        ctx.spent = True
        torch.ops.sophiavl.logits_gradients_(hidden, *whole, *common)
        return hidden.detach(), None, None
    wants = [x is not None and needed for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad)]
    found = torch.ops.sophiavl.logprob_gradients(hidden, weight, bias, *whole, active, ctx.main_grad, *wants, *common)
    wants[1] = wants[1] and ctx.main_grad is None
    return tuple(x if wanted else None for x, wanted in zip(found, wants))


logprob_attach.register_autograd(_backward, setup_context=_save)


def _first(tau: Tensor | None, temperature: float) -> float | Tensor:
    return temperature if tau is None else tau


def _backend(hidden: Tensor, weight: Tensor | None, wish: str) -> ModuleType:
    op = "logits_logprob" if weight is None else "linear_logprob"
    return load(op, resolve(op, wish, hidden.device, hidden.dtype))


def _as_given(x: Tensor) -> AbstractContextManager:
    """Autocast would round the operands of products that are meant to be taken as they are."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
