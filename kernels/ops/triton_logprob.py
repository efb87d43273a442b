"""linear_logprob and logits_logprob in Triton: the schedules. What they launch: triton_logprob_launches.py; choices: triton_logprob_plans.py.

Statistics, one of two schedules over tiles of the vocabulary:
    fused   one program a [128, 256] tile of logits, which never leaves it; 8 to 12 bytes a token and tile are merged by a second kernel
    tiled   cuBLAS writes [T, span] fp32 logits into a bounded workspace, a one-pass kernel merges their statistics into the running ones
Gradients, tile of the vocabulary after tile: rows that need one are packed side by side; a tile's logits are recomputed and become
their gradient [rows, span] in the operands' dtype; that times the weight adds to fp32 sums of hidden's gradient, and its transpose
times the packed rows is the weight's gradient, all rows in one accumulator: written once, or added to main_grad in fp32.
Where the host does not know the rows, a kernel lists those with an upstream gradient and their count stays on the device: programs
beyond it leave at once. No sync and no atomics: every schedule gives the same bits each time (cuBLAS by NVIDIA's own promise, for one stream).

Peak memory of the gradients beyond inputs, outputs and main_grad: `triton_logprob_plans.gradient_bytes`. At [16384, 3584, 152064] bf16:
packed rows 117.4 MB + fp32 sums 234.9 MB + gradient tile [16384, 5888] 192.9 MB + vectors 0.5 MB = 545.7 MB.
fp16 operands: gradients are scaled by a power of two, found on the device, so that small ones do not vanish.
"""
from __future__ import annotations

import torch
from torch import Tensor

from . import triton_logprob_launches as launch
from . import triton_logprob_plans as plans
from .triton_logprob_plans import ALIGN
from .triton_logprob_shipped import shipped

__all__ = ["gradients", "shipped", "statistics"]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def statistics(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, column: Tensor, here: Tensor, *, valid: int, temperature: float | Tensor,
    entropy: bool, chunk: int,
) -> Tensor:
    """[4, T] fp32 of `vocabulary.shard_statistics`. chunk is the reference's business."""
    tokens = len(column)
    out = torch.empty(4, tokens, dtype=torch.float32, device=hidden.device)
    if not tokens or not valid:
        for row, value in zip(out, (torch.finfo(torch.float32).min, 0.0, 0.0, -torch.inf)):
            row.fill_(value)
        return out
    column, inverse = column.where(here, -1).int(), _inverse(temperature, hidden)
    if weight is None:
        launch.row_statistics(_rows(hidden), None, column, inverse, out, 0, valid, entropy)()
        return out
    hidden, weight, bias = _rows(hidden), _rows(weight)[:valid], _dense(bias)
    plan = plans.choose(hidden, weight)
    if plan.statistics == "fused":
        tiles = -(-valid // plan.logits.columns)
        partial = torch.empty(2 + entropy, tiles, tokens, dtype=torch.float32, device=hidden.device)
        out[2], out[3] = 0, -torch.inf
        launch.tile_statistics(hidden, weight, bias, column, inverse, partial, out[3], plan.logits)()
        launch.merge_tiles(partial, out)()
        return out
    span = plans.columns_at_once(tokens, valid, 4, plans.STATISTICS_BYTES, plans.SPAN_STEP)
    workspace = torch.empty(tokens, min(span, valid), dtype=torch.float32, device=hidden.device)
    for first in range(0, valid, span):
        part = weight[first : first + span]
        logits = workspace[:, : len(part)]
        _multiply(hidden, part.T, logits, add=False)
        launch.row_statistics(logits, bias, column, inverse, out, first, len(part), entropy)()
    return out


def gradients(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, column: Tensor, here: Tensor, live: Tensor, top: Tensor, total: Tensor,
    logprob: Tensor, entropy: Tensor, g: Tensor, h: Tensor | None, *, valid: int, temperature: float | Tensor, active: Tensor | None,
    wants: tuple[bool, bool, bool], main_grad: Tensor | None, chunk: int, inplace: bool = False,
) -> Gradients:
    """Gradients of hidden, weight (None where main_grad takes it) and bias; arguments as in `reference_logprob.gradients`."""
    column, inverse = column.where(here, -1).int(), _inverse(temperature, hidden)
    upstream = (top, total, logprob, entropy, g, h)
    if weight is None:
        logits = _rows(hidden)
        out = hidden if inplace else torch.empty_like(hidden, memory_format=torch.contiguous_format)
        if out.numel():
            launch.row_gradient(logits, out, column, inverse, *upstream, valid)()
        return None if inplace else out, None, None
    hidden, weight, bias = _rows(hidden), _rows(weight), _dense(bias)
    d_hidden = hidden.new_zeros(hidden.shape) if wants[0] else None
    d_weight = main_grad
    if wants[1] and main_grad is None:
        d_weight = weight.new_empty(weight.shape)
        d_weight[valid:] = 0
    d_bias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device) if wants[2] else None
    if len(column) and valid and any(wants):
        packed = Packed(hidden, live, column, *upstream, active=active)
        _over_tiles(packed, weight[:valid], bias, inverse, d_hidden, d_weight if wants[1] else None, d_bias, main_grad is not None)
    elif d_weight is not None and main_grad is None:
        d_weight.zero_()
    found = d_weight if wants[1] and main_grad is None else None
    return d_hidden, found, None if d_bias is None or bias is None else d_bias.to(bias.dtype)


class Packed:
    """The rows that need a gradient, side by side: `rows` names them, `count` [1] int32 is their number on the device.

    known: their number where the host knows it. packed [slots, H], vectors [4, slots] (top, flat, tilt, own), columns [slots].
    scale, unscale: fp16's power of two and its inverse, else None.
    """

    def __init__(self, hidden: Tensor, live: Tensor, column: Tensor, top: Tensor, total: Tensor, logprob: Tensor, entropy: Tensor, g: Tensor,
                 h: Tensor | None, *, active: Tensor | None) -> None:
        tokens, width = hidden.shape
        device = hidden.device
        self.known = None if active is None else len(active)
        self.most = tokens if active is None else len(active)
        self.slots = -(-self.most // ALIGN) * ALIGN
        self.tilted = h is not None
        self.scale: Tensor | None = None
        self.unscale: Tensor | None = None
        if hidden.dtype == torch.float16:
            self.scale, self.unscale = _scales(g, h)
        self.packed = hidden.new_empty(self.slots, width)
        self.vectors = torch.empty(4, self.slots, dtype=torch.float32, device=device)
        self.columns = torch.empty(self.slots, dtype=torch.int32, device=device)
        if active is None:
            self.rows, self.count = (torch.empty(n, dtype=torch.int32, device=device) for n in (tokens, 1))
            launch.list_rows(g, h, self.rows, self.count)()
        else:
            self.rows, self.count = active.int(), torch.full((1,), len(active), dtype=torch.int32, device=device)
        launch.pack_rows(self, hidden, live, column, (top, total, logprob, entropy, g, h))()


def _over_tiles(p: Packed, weight: Tensor, bias: Tensor | None, inverse: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None, d_bias: Tensor | None,
                add: bool) -> None:
    """Fill d_hidden, d_weight (added to where `add`) and d_bias, vocabulary tile after vocabulary tile."""
    if not p.slots:
        if d_weight is not None and not add:
            d_weight[: len(weight)] = 0
        return
    plan = plans.choose(p.packed, weight)
    valid, width = weight.shape
    span = plans.columns_at_once(p.slots, valid, weight.element_size(), plans.GRADIENT_BYTES, plans.LEAST_SPAN)
    grad = weight.new_empty(p.slots, span)
    total = torch.empty(p.slots, width, dtype=torch.float32, device=weight.device) if d_hidden is not None else None
    cublas = p.known is not None and plan.known_rows == "cublas" and weight.dtype != torch.float16 and _cublas_adds(weight)
    for first in range(0, valid, span):
        part = weight[first : first + span]
        sums = None if d_bias is None else torch.zeros(p.slots // plan.gradient.rows + 1, span, dtype=torch.float32, device=weight.device)
        launch.tile_gradient(p, weight, bias, inverse, grad, sums, first, plan.gradient)()
        known = grad[: p.known, : len(part)] if cublas else None
        if total is not None and known is not None:
            _multiply(known, part, total[: p.known], add=first > 0)
        elif total is not None:
            launch.hidden_gradient(p, grad, weight, total, first, plan.hidden)()
        if d_weight is not None and known is not None and add:
            _multiply(known.T, p.packed[: p.known], d_weight[first : first + len(part)], add=True)
        elif d_weight is not None:
            launch.weight_gradient(p, grad, d_weight, valid, first, add, plan.weight)()
        if d_bias is not None and sums is not None:
            d_bias[first : first + len(part)] = sums.sum(0)[: len(part)]
    if total is not None and d_hidden is not None:
        launch.unpack_rows(p, total, d_hidden)()
    if d_bias is not None and p.unscale is not None:
        d_bias *= p.unscale


def _rows(x: Tensor) -> Tensor:
    """x with its rows contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense(x: Tensor | None) -> Tensor | None:
    """A vector with its numbers side by side: kernels are given its address alone."""
    return None if x is None else x.contiguous()


def _inverse(temperature: float | Tensor, like: Tensor) -> Tensor:
    """1 / temperature, [1] fp32 on the device."""
    if isinstance(temperature, Tensor):
        return temperature.float().reciprocal().reshape(1)
    return torch.full((1,), 1.0 / temperature, dtype=torch.float32, device=like.device)


def _scales(g: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
    """A power of two that takes the largest |gradient of a logit| to at most 2^14, and its inverse; [1] each. |p (log p + entropy)| < 16."""
    most = g.abs().amax() if h is None else g.abs().amax() + 16 * h.abs().amax()
    exponent = (16384 / most.clamp(min=1e-30)).log2().floor().reshape(1)
    return torch.ldexp(torch.ones_like(exponent), exponent.int()), torch.ldexp(torch.ones_like(exponent), -exponent.int())


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """out fp32 (+)= a b of 16-bit or fp32 operands, accumulated in fp32 and never rounded to 16 bits."""
    if a.is_cuda and a.dtype != torch.float32:
        if add:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.addmm(out, a.float(), b.float()) if add else a.float() @ b.float())


_ADDS: list[bool] = []


def _cublas_adds(like: Tensor) -> bool:
    """Whether this PyTorch adds 16-bit products to an fp32 matrix (2.10 and newer); older ones refuse, on the host, before any work."""
    if not like.is_cuda:
        return True
    if not _ADDS:
        a, c = like.new_zeros(16, 16), like.new_zeros(16, 16, dtype=torch.float32)
        try:
            _multiply(a, a, c, add=True)
            _ADDS.append(True)
        except RuntimeError:
            _ADDS.append(False)
    return _ADDS[0]
