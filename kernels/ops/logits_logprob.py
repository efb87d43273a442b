"""Log-prob (and entropy) of target tokens from logits that are already there."""
from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from .checks import FLOATS, INTEGERS, expect_tensor
from .dispatch import implementation
from .linear_logprob import check_common
from .vocabulary import Shard


def logits_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    backend: str = "auto",
    chunk: int = 1024,
    debug: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature)[target], statistics in fp32.

    logits [T, V/tp] fp32, bf16, fp16 (fp64 computes in fp64), -inf bans a token; target [T] int64 or int32 global ids,
    -100 gives 0 and no gradient. Other arguments, results and errors as in `linear_logprob`; the gradient of the
    logits has their dtype and is complete on every tensor-parallel rank.
    """
    expect_tensor("logits", logits, ("T", "V/tp"), FLOATS, logits.device)
    expect_tensor("target", target, (logits.shape[0],), INTEGERS, logits.device)
    shard = Shard.of(logits.shape[1], vocab_size, group)
    check_common(temperature, target, shard, chunk, debug)
    run = implementation("logits_logprob", backend, logits.device)
    return run(logits, target, shard, temperature=temperature, entropy=entropy, chunk=chunk)
