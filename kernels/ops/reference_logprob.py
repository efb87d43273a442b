"""Plain-PyTorch oracles of linear_logprob and logits_logprob, and what runs where no other backend exists."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .vocabulary import FLOOR, IGNORE, Shard, combine, shard_statistics

# Tiny vocabularies are not cut below this many logits a chunk (4 MiB).
SMALL = 1 << 20


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, shard: Shard, *, bias: Tensor | None, temperature: float | Tensor,
    entropy: bool, active: Tensor | None, main_grad: Tensor | None, chunk: int,
) -> tuple[Tensor, Tensor | None]:
    """Oracle of `sophiavl_fast.kernels.linear_logprob`, in chunks of tokens; products and statistics in fp32."""
    logprob, spread = _Logprob.apply(hidden, weight, bias, target, shard, temperature, entropy, active, main_grad, chunk)
    return logprob, spread if entropy else None


def logits_logprob(
    logits: Tensor, target: Tensor, shard: Shard, *, temperature: float | Tensor, entropy: bool, chunk: int,
) -> tuple[Tensor, Tensor | None]:
    """Oracle of `sophiavl_fast.kernels.logits_logprob`: the same without a projection."""
    logprob, spread = _Logprob.apply(logits, None, None, target, shard, temperature, entropy, None, None, chunk)
    return logprob, spread if entropy else None


class _Logprob(torch.autograd.Function):
    """Logits live one chunk at a time; the backward pass recomputes them. weight None: `hidden` holds the logits themselves."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, target: Tensor, shard: Shard,
        temperature: float | Tensor, entropy: bool, active: Tensor | None, main_grad: Tensor | None, chunk: int,
    ) -> tuple[Tensor, Tensor]:
        column, here = shard.locate(target)
        project = _Projection(weight, bias, shard.valid, temperature, _wide(hidden.dtype))
        chunk = max(chunk, SMALL // max(shard.valid, 1))
        parts = [shard_statistics(project(hidden[rows]), column[rows], here[rows], entropy) for rows in _slices(len(target), chunk)]
        whole = combine(torch.cat(parts, 1), shard.group)
        live = target != IGNORE
        logprob, spread = whole.logprob.where(live, 0), whole.entropy.where(live, 0)
        # An infinite maximum makes every probability of an ignored row 0, whatever the row holds.
        top, total = whole.top.where(live, torch.inf), whole.total.where(live, 1)
        ctx.save_for_backward(hidden, weight, bias, live, column, here & live, top, total, logprob, spread)
        ctx.shard, ctx.temperature, ctx.entropy, ctx.chunk = shard, temperature, entropy, chunk
        ctx.active, ctx.main_grad = active, main_grad
        ctx.set_materialize_grads(False)
        return logprob, spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, live, logprob = (ctx.saved_tensors[i] for i in (1, 3, 8))
        g = torch.zeros_like(logprob) if grad_logprob is None else grad_logprob.where(live, 0) / ctx.temperature
        h = None if grad_entropy is None or not ctx.entropy else grad_entropy.where(live, 0) / ctx.temperature
        if weight is None:
            return (_logits_gradient(ctx, g, h), *[None] * 9)
        return (*_linear_gradients(ctx, g, h), *[None] * 7)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, max(total, 1), size)]


class _Projection:
    """hidden rows -> this shard's logits in the wide dtype, padding left out; a fresh tensor each time."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None, valid: int, temperature: float | Tensor, wide: torch.dtype) -> None:
        self.weight = None if weight is None else weight[:valid].to(wide)
        self.bias = None if bias is None else bias[:valid].to(wide)
        self.valid, self.temperature, self.wide = valid, temperature, wide

    def __call__(self, rows: Tensor) -> Tensor:
        if self.weight is None:
            logits = rows[:, : self.valid].to(self.wide, copy=True)
        elif self.bias is None:
            logits = rows.to(self.wide) @ self.weight.T
        else:
            logits = torch.addmm(self.bias, rows.to(self.wide), self.weight.T)
        return logits if isinstance(self.temperature, float) and self.temperature == 1.0 else logits.div_(self.temperature)


def _shard_gradient(ctx: Any, logits: Tensor, rows: slice | Tensor, g: Tensor, h: Tensor | None) -> Tensor:
    """d(g . logprob + h . entropy)/d logits of the chosen rows, [t, valid]; h None: no entropy term. Overwrites `logits`.

    dlogprob/dl_j = [j = t] - p_j and dentropy/dl_j = -p_j (log p_j + entropy). The target's own entry is written from
    its log-prob: 1 - p_t as -expm1(log p_t) keeps the digits of confident tokens.
    """
    column, here, top, total, logprob, entropy, g = (x[rows] for x in (*ctx.saved_tensors[4:], g))
    shifted = logits.sub_(top[:, None])
    if not logits.shape[1]:
        return logits
    own = -g * logprob.expm1()
    if h is None:
        grad = shifted.exp_().mul_(-(g / total)[:, None])
    else:
        h = h[rows]
        exp, slope = shifted.exp(), h / total
        grad = shifted.clamp_(min=FLOOR).mul_(-slope[:, None]).sub_((g / total + slope * (entropy - total.log()))[:, None]).mul_(exp)
        own = own - h * logprob.exp() * (logprob.clamp(min=FLOOR) + entropy)
    at = column[:, None]
    return grad.scatter_(1, at, own[:, None].where(here[:, None], grad.gather(1, at)))


def _logits_gradient(ctx: Any, g: Tensor, h: Tensor | None) -> Tensor:
    logits, live = ctx.saved_tensors[0], ctx.saved_tensors[3]
    project = _Projection(None, None, ctx.shard.valid, ctx.temperature, _wide(logits.dtype))
    out = torch.zeros_like(logits)
    for rows in _slices(len(live), ctx.chunk):
        clean = logits[rows].masked_fill(~live[rows, None], 0)
        out[rows, : ctx.shard.valid] = _shard_gradient(ctx, project(clean), rows, g, h).to(out.dtype)
    return out


def _linear_gradients(ctx: Any, g: Tensor, h: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden (this rank's part), weight (None where main_grad takes it) and bias."""
    hidden, weight, bias, live = ctx.saved_tensors[:4]
    valid, wide = ctx.shard.valid, _wide(hidden.dtype)
    project = _Projection(weight, bias, valid, ctx.temperature, wide)
    wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    d_hidden = torch.zeros_like(hidden) if wants_hidden else None
    d_weight = None
    if wants_weight:
        d_weight = weight.new_zeros(weight.shape, dtype=wide) if ctx.main_grad is None else ctx.main_grad
    d_bias = bias.new_zeros(bias.shape, dtype=wide) if wants_bias else None
    for rows in _gradient_rows(ctx, g, h):
        clean = hidden[rows].to(wide).masked_fill(~live[rows, None], 0)
        grad = _shard_gradient(ctx, project(clean), rows, g, h)
        if d_hidden is not None and project.weight is not None:
            d_hidden[rows] = (grad @ project.weight).to(hidden.dtype)
        if d_weight is not None:
            d_weight[:valid].addmm_(grad.T, clean)
        if d_bias is not None:
            d_bias[:valid] += grad.sum(0)
    if d_weight is not None:
        d_weight = None if ctx.main_grad is not None else d_weight.to(weight.dtype)
    return d_hidden, d_weight, None if d_bias is None else d_bias.to(bias.dtype)


def _gradient_rows(ctx: Any, g: Tensor, h: Tensor | None) -> list[slice] | tuple[Tensor, ...]:
    """Chunks of the rows that need a gradient: the caller's, or those that are not zero where looking costs no sync."""
    if ctx.active is not None:
        return ctx.active.split(ctx.chunk)
    if g.device.type == "cpu":
        needed = g != 0 if h is None else (g != 0) | (h != 0)
        if not needed.all():
            return needed.nonzero()[:, 0].split(ctx.chunk)
    return _slices(len(g), ctx.chunk)
