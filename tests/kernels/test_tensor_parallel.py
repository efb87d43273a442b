"""Vocabulary shards of 1, 2, 3 and 4 real gloo processes equal the whole."""
from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sophiavl_fast.kernels import cpu_logprob, linear_logprob, logits_logprob


def _inputs(vocab, ranks, ignored=True):
    """hidden, padded weight and bias, targets; padding rows hold what must never enter. A vocabulary of one has nothing to ban."""
    g = torch.Generator().manual_seed(vocab)
    rows = -(-vocab // ranks)
    hidden, weight, bias = torch.randn(23, 6, generator=g), torch.full((rows * ranks, 6), 1e30), torch.full((rows * ranks,), torch.nan)
    weight[:vocab], bias[:vocab] = torch.randn(vocab, 6, generator=g), torch.randn(vocab, generator=g)
    bias[1:2] = -torch.inf if vocab > 1 else torch.nan
    target = torch.randint(min(2, vocab - 1), vocab, (23,), generator=g)
    target[::6] = -100 if ignored else vocab - 1
    return hidden, weight, bias, target, torch.randn(2, 23, generator=g)


def _run(hidden, weight, bias, target, upstream, vocab, group):
    hidden, weight, bias = (x.clone().requires_grad_() for x in (hidden, weight, bias))
    logprob, entropy = linear_logprob(hidden, weight, target, bias=bias, temperature=0.9, entropy=True, vocab_size=vocab, group=group)
    (logprob * upstream[0] + entropy * upstream[1]).sum().backward()
    return logprob.detach(), entropy.detach(), hidden.grad, weight.grad, bias.grad


def _join(rank, world, store):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)   # what nobody wrote is NaN then
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60))


def _rank(rank, world, store, vocabs, ignored):
    _join(rank, world, store)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for ranks in range(1, world + 1):
        group = dist.new_group(list(range(ranks)))
        if rank >= ranks:
            continue
        for vocab in vocabs:
            hidden, weight, bias, target, upstream = _inputs(vocab, ranks, ignored)
            whole = _run(hidden, weight, bias, target, upstream, vocab, None)
            mine = slice(rank * len(weight) // ranks, (rank + 1) * len(weight) // ranks)
            part = _run(hidden, weight[mine], bias[mine], target, upstream, vocab, group)
            dist.all_reduce(part[2], group=group)
            for got, want in zip(part, (*whole[:3], whole[3][mine], whole[4][mine])):
                close(got, want)
            logits = (hidden @ weight.T + bias).masked_fill(torch.arange(len(weight)) >= vocab, torch.nan)
            piece, full = logits[:, mine].clone().requires_grad_(), logits.clone().requires_grad_()
            got, want = logits_logprob(piece, target, vocab_size=vocab, group=group)[0], logits_logprob(full, target, vocab_size=vocab)[0]
            close(got, want)
            close(torch.autograd.grad(got, piece, upstream[0])[0], torch.autograd.grad(want, full, upstream[0])[0][:, mine])
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [4])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_shards_equal_the_whole(world, backend, tmp_path, monkeypatch):
    """A ragged vocabulary, ones that leave whole shards empty (5 over 4 ranks of 2, a single token), one that divides."""
    if backend == "cpu" and (why := cpu_logprob.unavailable("linear_logprob", torch.device("cpu"), torch.float32)):
        pytest.skip(why)
    monkeypatch.setenv("SOPHIAVL_KERNELS", backend)  # inherited by the ranks
    mp.spawn(_rank, (world, tmp_path / "store", (37, 5, 24, 1), backend == "reference"), nprocs=world)


def _uneven(rank, world, store):
    _join(rank, world, store)
    target, weight = torch.zeros(4, dtype=torch.int64), torch.randn(3 + rank, 6)
    for vocab in (None, 3):
        with pytest.raises(ValueError, match=r"weight = shards of \[3, 4\] rows: expected as many on every rank: pad the last and give the true vocab_size"):
            linear_logprob(torch.randn(4, 6), weight, target, vocab_size=vocab, group=dist.group.WORLD)
        with pytest.raises(ValueError, match=r"logits = shards of \[3, 4\] rows"):
            logits_logprob(torch.randn(4, 3 + rank), target, vocab_size=vocab, group=dist.group.WORLD)
    dist.destroy_process_group()


def test_uneven_shards_are_refused_on_every_rank(tmp_path):
    mp.spawn(_uneven, (2, tmp_path / "store"), nprocs=2)
