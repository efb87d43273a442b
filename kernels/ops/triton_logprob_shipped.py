"""What the Triton log-probs launch, on `meta` tensors of typical sizes, for ahead-of-time compilation."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import triton_logprob_launches as launch
from . import triton_logprob_plans as plans
from .shipped import Launch, Shipped
from .triton_logprob_plans import Tile

TOKENS, WIDTH, VALID, SPAN = 16384, 3584, 152064, 5888
# tile, architectures, programs a multiprocessor, sizes (tokens, hidden, vocabulary). uneven: no multiples of 16 but the hidden size's;
# odd: rows that are not aligned either
PRODUCTS: dict[str, tuple[Tile, torch.dtype, tuple[int, ...], int, tuple[int, int, int]]] = {
    "sm90": (plans.WIDE_90, torch.bfloat16, (90,), 1, (TOKENS, WIDTH, VALID)),
    "sm90-uneven": (plans.WIDE_90, torch.bfloat16, (90,), 1, (TOKENS - 1, WIDTH, 151665)),
    "sm80": (plans.WIDE_80, torch.bfloat16, (80,), 2, (TOKENS, WIDTH, VALID)),
    "sm80-uneven": (plans.WIDE_80, torch.bfloat16, (80,), 2, (TOKENS - 1, WIDTH, 151665)),
    "odd": (plans.SMALL, torch.bfloat16, (80, 90), 2, (TOKENS - 1, WIDTH - 1, VALID - 1)),
    "fp32": (plans.SMALL, torch.float32, (80, 90), 2, (TOKENS, WIDTH, VALID)),
}


def shipped() -> list[Shipped]:
    """Every kernel in the variants that the trainer and its tests launch, and the tiles of every table entry."""
    found = []
    for name, (tile, dtype, archs, occupancy, sizes) in PRODUCTS.items():
        shape = (tile.rows, tile.columns) if dtype != torch.float32 else None  # fp32 takes no matrix unit
        for variant, one in _products(tile, dtype, *sizes).items():
            found.append(Shipped.of(f"linear_logprob/{variant}/{name}", one, archs=archs, occupancy=occupancy, product=shape))
    for name in ("sm80", "sm90"):
        tile, _, archs, occupancy, _ = PRODUCTS[name]
        packed, gradient, into = _packed(torch.float16, WIDTH, scaled=True), _new(torch.float16, TOKENS, SPAN), _new(torch.float16, VALID, WIDTH)
        scaled = launch.weight_gradient(packed, gradient, into, VALID, 0, False, tile)
        found.append(Shipped.of(f"linear_logprob/weight_gradient-fp16/{name}", scaled, archs=archs, occupancy=occupancy, product=(tile.rows, tile.columns)))
    return found + [Shipped.of(f"logprob/{name}", one, occupancy=occupancy) for name, (one, occupancy) in _rows().items()]


def _new(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _packed(dtype: torch.dtype, width: int, *, tilted: bool = False, scaled: bool = False) -> Any:
    number = lambda d=torch.float32: _new(d, 1)
    return SimpleNamespace(
        packed=_new(dtype, TOKENS, width), vectors=_new(torch.float32, 4, TOKENS), columns=_new(torch.int32, TOKENS), rows=_new(torch.int32, TOKENS),
        count=number(torch.int32), tilted=tilted, scale=number() if scaled else None, unscale=number() if scaled else None, slots=TOKENS, most=TOKENS)


def _products(tile: Tile, dtype: torch.dtype, tokens: int, width: int, valid: int) -> dict[str, Launch]:
    f32 = lambda *shape: _new(torch.float32, *shape)
    hidden, weight, bias, inverse = _new(dtype, tokens, width), _new(dtype, valid, width), f32(valid), f32(1)
    grad, total, sums = _new(dtype, TOKENS, SPAN), f32(TOKENS, width), f32(TOKENS // tile.rows + 1, SPAN)
    p, tilted = _packed(dtype, width), _packed(dtype, width, tilted=True)
    column, tiles = _new(torch.int32, tokens), -(-valid // tile.columns)
    statistics = lambda b, n: launch.tile_statistics(hidden, weight, b, column, inverse, f32(n, tiles, tokens), f32(tokens), tile)
    gradient = lambda rows, b, s: launch.tile_gradient(rows, weight, b, inverse, grad, s, SPAN, tile)
    return {
        "tile_statistics": statistics(None, 2), "tile_statistics-bias": statistics(bias, 2), "tile_statistics-entropy": statistics(None, 3),
        "tile_statistics-bias-entropy": statistics(bias, 3), "tile_gradient": gradient(p, None, None), "tile_gradient-bias": gradient(p, bias, None),
        "tile_gradient-entropy": gradient(tilted, None, None), "tile_gradient-bias-entropy": gradient(tilted, bias, None),
        "tile_gradient-d_bias": gradient(tilted, bias, sums), "hidden_gradient-first": launch.hidden_gradient(p, grad, weight, total, 0, tile),
        "hidden_gradient": launch.hidden_gradient(p, grad, weight, total, SPAN, tile),
        "weight_gradient": launch.weight_gradient(p, grad, _new(dtype, valid, width), valid, SPAN, False, tile),
        "weight_gradient-main_grad": launch.weight_gradient(p, grad, f32(valid, width), valid, SPAN, True, tile),
    }


def _rows() -> dict[str, tuple[Launch, int]]:
    """Launch and programs a multiprocessor, of what is bound by memory."""
    f32 = lambda *shape: _new(torch.float32, *shape)
    column, inverse, out, row = _new(torch.int32, TOKENS), f32(1), f32(4, TOKENS), f32(TOKENS)
    logits, tile = _new(torch.bfloat16, TOKENS, VALID), f32(TOKENS, 4096)
    upstream = (row, row, row, row, row)
    found: dict[str, tuple[Launch, int]] = {}
    for entropy in (False, True):
        end = "-entropy" if entropy else ""
        h = row if entropy else None
        p = _packed(torch.bfloat16, WIDTH, tilted=entropy)
        found |= {
            f"merge_tiles{end}": (launch.merge_tiles(f32(2 + entropy, 594, TOKENS), out), 4),
            f"row_statistics-bf16{end}": (launch.row_statistics(logits, None, column, inverse, out, 0, VALID, entropy), 2),
            f"row_statistics-tile{end}": (launch.row_statistics(tile, f32(VALID), column, inverse, out, 4096, 4096, entropy), 2),
            f"row_gradient-bf16{end}": (launch.row_gradient(logits, logits, column, inverse, *upstream, h, VALID), 4),
            f"row_gradient-fp32{end}": (launch.row_gradient(f32(TOKENS, VALID), f32(TOKENS, VALID), column, inverse, *upstream, h, VALID), 4),
            f"list_rows{end}": (launch.list_rows(row, h, column, column[:1]), 1),
            f"pack_rows{end}": (launch.pack_rows(p, _new(torch.bfloat16, TOKENS, WIDTH), _new(torch.bool, TOKENS), column, (*upstream, h)), 8),
        }
    p = _packed(torch.bfloat16, WIDTH)
    found["unpack_rows"] = (launch.unpack_rows(p, f32(TOKENS, WIDTH), _new(torch.bfloat16, TOKENS, WIDTH)), 8)
    return found
