"""grpo_loss in Triton: two launches, three where an option needs sums of whole responses first. Kernels: triton_loss_kernels.py.

Bytes a token: 4 for each of logprob, old, rollout, reference, entropy that is given, 1 for each mask, 4 for each gradient
asked for; nothing else of size T is read or written, so bandwidth is the floor.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import triton_loss_kernels as kernels
from .coefficients import launched
from .loss_ops import COEFFICIENTS
from .shipped import Launch, Shipped
from .stats import STATS, SUMS

# One warp a block: its sums need no barrier. 8 tokens a lane; 16 would halve the warps that hide latency.
TOKENS = {"BLOCK": 256, "num_warps": 1}
RESPONSE = {"BLOCK": 2048, "num_warps": 8}
REDUCE = {"BLOCK": 1024, "num_warps": 4}
ARMS = 32  # of the search in the boundaries: one a lane


def forward(logprob: Tensor, advantage: Tensor, cu_seqlens: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(loss, stats [K], d loss / d logprob [T] or None, d loss / d entropy [T] or None); arguments as in `reference_loss.forward`, fp32 only."""
    launches, results = plan(logprob, advantage, cu_seqlens, **options)
    for launch in launches:
        launch()
    return results


def plan(logprob: Tensor, advantage: Tensor, cu_seqlens: Tensor, *, gradient: bool, entropy_gradient: bool, **o: Any) -> tuple[list[Launch], Any]:
    """The launches in order, and the tensors that they fill."""
    tokens, rows, device = len(logprob), len(cu_seqlens) - 1, logprob.device
    blocks = -(-tokens // TOKENS["BLOCK"])
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=device)
    share, mean = o["ratio"] == "sequence", o["aggregate"] == "sequence"
    given = {
        "logprob": logprob, "old": o["old_logprob"], "advantage": advantage, "bounds": cu_seqlens, "mask": _bytes(o["mask"]),
        "mismatch": _bytes(o["mismatch_mask"]), "rollout": o["rollout_logprob"],
    }
    given = {name: None if x is None else x.contiguous() for name, x in given.items()}
    layout = {"ADVANTAGE_BY_TOKEN": len(advantage) != rows, "MISMATCH_BY_TOKEN": o["mismatch_mask"] is not None and len(o["mismatch_mask"]) != rows}
    coefficients, on_device = launched(COEFFICIENTS, o)
    sums = new(5, rows) if share or mean else None
    # Without a mask the boundaries tell which responses have tokens; the sums do too.
    seen = torch.zeros(rows, dtype=torch.uint8, device=device) if o["mask"] is not None and sums is None else None
    entropy = None if o["entropy"] is None else o["entropy"].contiguous()
    d_logprob, d_entropy = new(tokens) if gradient else None, new(tokens) if entropy_gradient and entropy is not None else None
    loss, stats, partial = new(), new(len(STATS)), new(len(STATS), blocks)
    launches = []
    if sums is not None:
        launches.append(Launch(
            kernel=kernels.response_sums, grid=(rows,), num_warps=RESPONSE["num_warps"],
            arguments=given | layout | {"sums": sums, "rows": rows, "tis_cap": coefficients["tis_cap"], "TIS_ON_DEVICE": bool(on_device & 128), "RATIO": share,
                                        "TIS": o["tis_cap"] is not None, "BLOCK": RESPONSE["BLOCK"]}))
    by_row = not all(layout[k] or o[name] is None for k, name in (("ADVANTAGE_BY_TOKEN", "variant"), ("MISMATCH_BY_TOKEN", "mismatch_mask")))
    launches.append(Launch(
        kernel=kernels.token_pass, grid=(blocks,), num_warps=TOKENS["num_warps"],
        arguments=given | layout | coefficients | {
            "ref": None if o["ref_logprob"] is None else o["ref_logprob"].contiguous(), "entropy": entropy, "sums": sums, "d_logprob": d_logprob,
            "d_entropy": d_entropy, "partial": partial, "seen": seen, "tokens": tokens, "rows": rows, "blocks": blocks, "ON_DEVICE": on_device,
            "CISPO": o["variant"] == "cispo", "SEQUENCE_RATIO": share, "SEQUENCE_MEAN": mean, "KL": int(o["kl"][1]), "LOCATE": by_row or sums is not None or
            seen is not None, "WIDTH": ARMS, "LEVELS": levels(rows + 1), "BLOCK": TOKENS["BLOCK"]}))
    launches.append(Launch(
        kernel=kernels.reduce_partials, grid=(len(STATS),), num_warps=REDUCE["num_warps"],
        arguments={"partial": partial, "bounds": given["bounds"], "sums": sums, "seen": seen, "stats": stats, "loss": loss, "blocks": blocks, "rows": rows,
                   "SUMS": SUMS, "SEQUENCES": STATS.index("sequences"), "BLOCK": REDUCE["BLOCK"]}))
    return launches, (loss, stats, d_logprob, d_entropy)


def levels(boundaries: int) -> int:
    """Steps of a search with ARMS arms over this many boundaries."""
    steps = 1
    while ARMS ** steps < boundaries:
        steps += 1
    return steps


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


NAMED: dict[str, dict[str, Any]] = {
    "grpo": {}, "gspo": {"ratio": "sequence", "aggregate": "sequence"}, "cispo": {"variant": "cispo"},
    "dr-grpo": {"aggregate": "constant", "max_length": 4096.0}, "stable-reinforce": {"pre_clip": 1.1, "dual_clip": 3.0, "kl": "k2"},
    "masked": {"mask": True, "mismatch_mask": True, "tis_cap": 2.0, "entropy_coef": 0.01},
}


def shipped() -> list[Shipped]:
    """What the trainer's algorithms launch, on tensors of typical size."""
    tokens, rows = 512 * 2048, 512
    flat = lambda dtype=torch.float32, n=tokens: torch.empty(n, dtype=dtype, device="meta")
    base = {
        "old_logprob": flat(), "mask": None, "denominator": 1.0e6, "variant": "ppo", "ratio": "token", "aggregate": "token", "max_length": None,
        "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "pre_clip": None, "ref_logprob": flat(), "kl": "k3", "kl_coef": 0.01,
        "rollout_logprob": flat(), "tis_cap": None, "mismatch_mask": None, "entropy": flat(), "entropy_coef": 0.0, "gradient": True,
    }
    found = []
    for name, change in NAMED.items():
        options = base | change | {k: flat(torch.bool) for k in ("mask", "mismatch_mask") if change.get(k)}
        options["entropy_gradient"] = options["entropy_coef"] > 0
        for launch in plan(flat(), flat(n=rows), flat(torch.int64, rows + 1), **options)[0]:
            kernel = launch.kernel.__name__
            if kernel == "token_pass" or name in ("grpo", "gspo"):  # the others share these two's
                found.append(Shipped.of(f"grpo_loss/{kernel}/{name}", launch, occupancy=12 if kernel == "token_pass" else 2))
    return found
