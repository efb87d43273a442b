"""Log-prob (and entropy) of target tokens from logits that are already there."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .checks import FLOATS, INTEGERS, expect, expect_tensor, reads_contents
from .coefficients import Coefficient
from .linear_logprob import check_common
from .logprob_ops import logprob
from .vocabulary import Shard


def logits_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: Coefficient = 1.0,
    entropy: bool = False,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    inplace: bool = False,
    backend: str = "auto",
    chunk: int = 1024,
    debug: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature)[target], statistics in fp32.

    logits [T, V/tp] fp32, bf16, fp16 (fp64 computes in fp64), -inf bans a token; target [T] int64 or int32 global ids,
    -100 gives 0 and no gradient. Other arguments, results and errors as in `linear_logprob`; the gradient of the
    logits has their dtype and is complete on every tensor-parallel rank.

    inplace: the backward pass turns the logits' own memory into their gradient, so that no second [T, V/tp] exists; a
    second backward pass, or another op that still needs the logits, is an error. Not for leaves; torch.compile ignores it,
    and create_graph=True copies the gradient.
    """
    expect_tensor("logits", logits, ("T", "V/tp"), FLOATS, differentiable=True)
    expect_tensor("target", target, (logits.shape[0],), INTEGERS, logits.device)
    shard = Shard.of("logits", logits.shape[1], vocab_size, group, agree=reads_contents(target, debug))
    check_common(temperature, target, shard, chunk, backend, debug=debug, entropy=entropy, inplace=inplace)
    if inplace and torch.is_grad_enabled() and logits.requires_grad:
        expect(not logits.is_leaf, "inplace", inplace, "False for a leaf tensor, whose values are the caller's to keep")
        expect(logits.is_contiguous(), "inplace", inplace, f"contiguous logits, these have strides {logits.stride()}")
    return logprob(logits, None, None, target, shard, temperature=temperature, entropy=entropy, active=None, main_grad=None, chunk=chunk,
                   backend=backend, inplace=inplace and not torch.compiler.is_compiling())
