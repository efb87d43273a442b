"""Log-prob (and entropy) of target tokens straight from hidden states and the output projection."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .checks import FLOATS, INTEGERS, expect, expect_choice, expect_count, expect_flags, expect_number, expect_tensor, reads_contents
from .coefficients import Coefficient
from .dispatch import WISHES
from .logprob_ops import logprob
from .vocabulary import IGNORE, Shard, wide

COLDEST, HOTTEST = 1e-30, 1e30  # temperature: it, its inverse and a logit over it are all numbers in fp32


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Coefficient = 1.0,
    entropy: bool = False,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    active: Tensor | None = None,
    main_grad: Tensor | None = None,
    backend: str = "auto",
    chunk: int = 1024,
    debug: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax((hidden @ weight.T + bias) / temperature)[target], without ever holding [T, V].

    hidden      [T, H] fp32, bf16 or fp16 (fp64 computes in fp64: for oracles)
    weight      [V/tp, H], hidden's dtype: this rank's rows of the output projection, equal shards in rank order
    target      [T] int64 or int32 global token ids; -100 gives 0 and no gradient, whatever the row holds
    bias        [V/tp]; -inf bans a token. Added before the division by the temperature, as samplers do
    temperature float, or a 0-d tensor on the device; 1e-30 to 1e30, a constant to autograd
    entropy     also return the entropy (nats) of each row's distribution
    vocab_size  the true vocabulary: rows from there on are padding and never enter
    group       tensor-parallel group; one all-gather of four floats a token (and of the shards' sizes where contents are read)
    active      [A] int64 rows that need a gradient, where the caller knows; the others get none
    main_grad   [V/tp, H] fp32: the weight's gradient is added to it and autograd gets none for the weight
    backend     auto | triton | cpu | reference, see `dispatch`
    chunk       rows of logits that the reference backend holds at once (more where the vocabulary is tiny)
    debug       read contents (targets in range) on a GPU too, at the cost of a sync

    Returns (logprob [T], entropy [T] or None), fp32. Differentiable in hidden, weight and bias; under tensor
    parallelism hidden's gradient is this rank's part, to be summed once over the group by the caller.
    First derivatives by torch.autograd only: differentiating the gradient again is a RuntimeError; tangents, torch.func
    transforms and a temperature that requires a gradient while it is recorded are a ValueError.
    Raises ValueError naming the argument, its value and what was expected.
    """
    expect_tensor("hidden", hidden, ("T", "H"), FLOATS, differentiable=True)
    device, (rows, width) = hidden.device, hidden.shape
    expect(width > 0, "hidden", f"a tensor of shape {list(hidden.shape)}", "H of at least 1")
    expect_tensor("weight", weight, ("V/tp", width), (hidden.dtype,), device, differentiable=True)
    expect_tensor("target", target, (rows,), INTEGERS, device)
    if bias is not None:
        expect_tensor("bias", bias, (weight.shape[0],), FLOATS, device, differentiable=True)
    if main_grad is not None:
        expect_tensor("main_grad", main_grad, weight.shape, (wide(weight.dtype),), device)
        expect(main_grad.is_contiguous(), "main_grad", f"a tensor of strides {main_grad.stride()}", "a contiguous one")
    if active is not None:
        expect_tensor("active", active, ("A",), (torch.int64,), device)
    shard = Shard.of("weight", weight.shape[0], vocab_size, group, agree=reads_contents(target, debug))
    check_common(temperature, target, shard, chunk, backend, debug=debug, entropy=entropy)
    if active is not None and active.numel() and reads_contents(active, debug):
        once = len(active.unique()) == len(active)
        expect(active.min().item() >= 0 and active.max().item() < rows and once, "active", active.tolist(), f"rows in [0, {rows}), each once")
    return logprob(hidden, weight, bias, target, shard, temperature=temperature, entropy=entropy, active=active, main_grad=main_grad,
                   chunk=chunk, backend=backend)


def check_common(temperature: Coefficient, target: Tensor, shard: Shard, chunk: int, backend: str, *, debug: bool, **flags: bool) -> None:
    """Checks that linear_logprob and logits_logprob share."""
    expect_flags(debug=debug, **flags)
    expect_choice("backend", backend, WISHES)
    expect_number("temperature", temperature, target.device, least=COLDEST, most=HOTTEST, debug=debug)
    expect_count("chunk", chunk, 1)
    if target.numel() and reads_contents(target, debug):
        wrong = target[((target < 0) | (target >= shard.vocab_size)) & (target != IGNORE)]
        expect(not wrong.numel(), "target", wrong[:1].tolist(), f"ids in [0, {shard.vocab_size}), or {IGNORE}")
