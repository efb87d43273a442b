"""Plain-PyTorch oracles of linear_logprob and logits_logprob, and what runs where no other backend exists.

Logits live one chunk of tokens at a time; the backward pass recomputes them. weight None: `hidden` holds the logits.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .vocabulary import FLOOR, shard_statistics, wide

# Tiny vocabularies are not cut below this many logits a chunk (4 MiB).
SMALL = 1 << 20
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def statistics(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, column: Tensor, here: Tensor, *, valid: int, temperature: float | Tensor,
    entropy: bool, chunk: int,
) -> Tensor:
    """[4, T] of `vocabulary.shard_statistics`; products and statistics in fp32 (fp64 for fp64)."""
    project = _Projection(weight, bias, valid, temperature, wide(hidden.dtype))
    parts = [shard_statistics(project(hidden[rows]), column[rows], here[rows], entropy) for rows in _slices(len(column), _chunk(chunk, valid))]
    return torch.cat(parts, 1)


def gradients(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, column: Tensor, here: Tensor, live: Tensor, top: Tensor, total: Tensor,
    logprob: Tensor, entropy: Tensor, g: Tensor, h: Tensor | None, *, valid: int, temperature: float | Tensor, active: Tensor | None,
    wants: tuple[bool, bool, bool], main_grad: Tensor | None, chunk: int, inplace: bool = False,
) -> Gradients:
    """Gradients of sum(g temperature . logprob + h temperature . entropy): hidden, weight (None where main_grad takes it), bias.

    column, here, live, top, total, logprob, entropy, g, h are [T]; ignored rows (not live) have g = h = 0 and top = inf.
    inplace: the logits (weight None) become their own gradient.
    """
    whole = _Whole(column, here, top, total, logprob, entropy, g, h)
    chunk = _chunk(chunk, valid)
    if weight is None:
        return _logits_gradient(whole, hidden, live, valid, temperature, chunk, inplace), None, None
    dtype = wide(hidden.dtype)
    project = _Projection(weight, bias, valid, temperature, dtype)
    d_hidden = torch.zeros_like(hidden) if wants[0] else None
    d_weight = None
    if wants[1]:
        d_weight = weight.new_zeros(weight.shape, dtype=dtype) if main_grad is None else main_grad
    d_bias = bias.new_zeros(bias.shape, dtype=dtype) if wants[2] and bias is not None else None
    for rows in _gradient_rows(active, g, h, chunk):
        clean = hidden[rows].to(dtype).masked_fill(~live[rows, None], 0)
        grad = whole.gradient(project(clean), rows)
        if d_hidden is not None and project.weight is not None:
            d_hidden[rows] = (grad @ project.weight).to(hidden.dtype)
        if d_weight is not None:
            d_weight[:valid].addmm_(grad.T, clean)
        if d_bias is not None:
            d_bias[:valid] += grad.sum(0)
    d_weight = None if d_weight is None or main_grad is not None else d_weight.to(weight.dtype)
    return d_hidden, d_weight, None if d_bias is None or bias is None else d_bias.to(bias.dtype)


def _chunk(chunk: int, valid: int) -> int:
    return max(chunk, SMALL // max(valid, 1))


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, max(total, 1), size)]


class _Projection:
    """hidden rows -> this shard's logits in the wide dtype, padding left out; a fresh tensor each time."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None, valid: int, temperature: float | Tensor, dtype: torch.dtype) -> None:
        self.weight = None if weight is None else weight[:valid].to(dtype)
        self.bias = None if bias is None else bias[:valid].to(dtype)
        self.valid, self.temperature, self.dtype = valid, temperature, dtype

    def __call__(self, rows: Tensor) -> Tensor:
        if self.weight is None:
            logits = rows[:, : self.valid].to(self.dtype, copy=True)
        elif self.bias is None:
            logits = rows.to(self.dtype) @ self.weight.T
        else:
            logits = torch.addmm(self.bias, rows.to(self.dtype), self.weight.T)
        return logits if isinstance(self.temperature, float) and self.temperature == 1.0 else logits.div_(self.temperature)


class _Whole:
    """What the rows' gradient needs besides their logits, [T] each."""

    def __init__(self, column: Tensor, here: Tensor, top: Tensor, total: Tensor, logprob: Tensor, entropy: Tensor, g: Tensor, h: Tensor | None) -> None:
        self.vectors, self.h = (column, here, top, total, logprob, entropy, g), h

    def gradient(self, logits: Tensor, rows: slice | Tensor) -> Tensor:
        """d(g . logprob + h . entropy)/d logits of the chosen rows, [t, valid]; h None: no entropy term. Overwrites `logits`.

        dlogprob/dl_j = [j = t] - p_j and dentropy/dl_j = -p_j (log p_j + entropy). The target's own entry is written from
        its log-prob: 1 - p_t as -expm1(log p_t) keeps the digits of confident tokens.
        """
        column, here, top, total, logprob, entropy, g = (x[rows] for x in self.vectors)
        shifted = logits.sub_(top[:, None])
        if not logits.shape[1]:
            return logits
        own = -g * logprob.expm1()
        if self.h is None:
            grad = shifted.exp_().mul_(-(g / total)[:, None])
        else:
            h = self.h[rows]
            exp, slope = shifted.exp(), h / total
            grad = shifted.clamp_(min=FLOOR).mul_(-slope[:, None]).sub_((g / total + slope * (entropy - total.log()))[:, None]).mul_(exp)
            own = own - h * logprob.exp() * (logprob.clamp(min=FLOOR) + entropy)
        at = column[:, None]
        return grad.scatter_(1, at, own[:, None].where(here[:, None], grad.gather(1, at)))


def _logits_gradient(whole: _Whole, logits: Tensor, live: Tensor, valid: int, temperature: float | Tensor, chunk: int, inplace: bool) -> Tensor | None:
    project = _Projection(None, None, valid, temperature, wide(logits.dtype))
    out = logits if inplace else torch.zeros_like(logits)
    for rows in _slices(len(live), chunk):
        clean = logits[rows].masked_fill(~live[rows, None], 0)
        out[rows, :valid] = whole.gradient(project(clean), rows).to(out.dtype)
    if inplace:
        out[:, valid:] = 0
    return None if inplace else out


def _gradient_rows(active: Tensor | None, g: Tensor, h: Tensor | None, chunk: int) -> list[slice] | tuple[Tensor, ...]:
    """Chunks of the rows that need a gradient: the caller's, or those that are not zero where looking costs no sync."""
    if active is not None:
        return active.split(chunk)
    if g.device.type == "cpu":
        needed = g != 0 if h is None else (g != 0) | (h != 0)
        if not needed.all():
            return needed.nonzero()[:, 0].split(chunk)
    return _slices(len(g), chunk)
