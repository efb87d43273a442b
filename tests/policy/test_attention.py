"""Group attention against a dense mask over the whole row, forward and backward."""
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F

from sophiavl_fast.errors import UserError
from sophiavl_fast.policy import attention
from sophiavl_fast.policy.families.qwen2_5_vl import Qwen2_5_VL
from sophiavl_fast.policy.packing import pack


class Text:
    """A family whose prompts are text: position = index."""

    positions = staticmethod(lambda tokens, grid, where: (torch.arange(len(tokens)).expand(3, -1), len(tokens)))


def row(seed, multiple=1):
    g = torch.Generator().manual_seed(seed)
    length = lambda low, high: int(torch.randint(low, high, (1,), generator=g))
    groups = [tiny.group(g, str(i), [], [length(1, 40) for _ in range(length(1, 9))], text=length(1, 70)) for i in range(5)]
    (batch,) = pack(groups, None, Text, share_prompt=True, budget=10**6, multiple=multiple)
    return batch


def dense_mask(batch):
    """[S, S] bool by the definition: causal, and within the group the prompt or the own response; padding sees padding."""
    size = len(batch.tokens)
    group, part = torch.full((size,), -1), torch.zeros(size, dtype=torch.int64)
    for g in range(len(batch.prompt_len)):
        group[batch.group_start[g]:batch.group_start[g + 1]] = g
    for i, start in enumerate(batch.response_start):
        part[start:start + batch.cu_seqlens[i + 1] - batch.cu_seqlens[i]] = i + 1
    visible = (group[:, None] == group) & ((part == 0) | (part[:, None] == part))
    return visible & torch.ones(size, size, dtype=torch.bool).tril()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("heads,groups", [(4, 2), (3, 3), (8, 1)])
def test_equals_a_dense_mask(seed, heads, groups):
    batch = row(seed, multiple=64)
    size = len(batch.tokens)
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(size, n, 16, generator=g, requires_grad=True) for n in (heads, groups, groups))
    upstream = torch.randn(size, heads * 16, generator=g)
    plan = attention.plan_row(batch, device=torch.device("cpu"), dtype=torch.float32, query_heads_per_key=heads // groups)
    found = attention.attend(q, k, v, plan)
    grads = torch.autograd.grad((found * upstream).sum(), (q, k, v))
    spread = lambda x: x.transpose(0, 1).repeat_interleave(heads // x.shape[1], 0)
    expected = F.scaled_dot_product_attention(spread(q), spread(k), spread(v), attn_mask=dense_mask(batch)).transpose(0, 1).flatten(1)
    assert (found - expected).abs().max() < 1e-5
    for mine, theirs in zip(grads, torch.autograd.grad((expected * upstream).sum(), (q, k, v))):
        assert (mine - theirs).abs().max() < 1e-4


def test_flash_layout_names_the_same_keys():
    """What the variable-length kernel is told: segment by segment, its keys in order, aligned to the end."""
    batch = row(4, multiple=64)
    mask = dense_mask(batch)
    segments = attention._segments(batch)
    start, length, context = segments.begin, segments.length, segments.context
    keys = attention._key_rows(segments).split((length + context).tolist())
    assert torch.equal(start, F.pad(length.cumsum(0), (1, 0))[:-1])  # segments tile the row: queries stay where they are
    for s, n, rows in zip(start.tolist(), length.tolist(), keys):
        for i in range(n):  # causal, aligned to the end: query i of n sees all but the last n - 1 - i keys
            assert torch.equal(rows[: len(rows) - (n - 1 - i)].sort()[0], mask[s + i].nonzero()[:, 0])


@pytest.mark.parametrize(("device", "package", "expected"), [
    ("cpu", None, "is for a GPU, and the device is cpu; use varlen"), ("cuda", None, "cannot be imported .*: pip install flash-attn, or use varlen"),
    ("cuda", SimpleNamespace(__name__="flash_attn", __version__="4.0"), "cannot be imported .*flash_attn_varlen_func"),   # another package of its name
    ("cuda", SimpleNamespace(flash_attn_varlen_func=print, __version__="2.0.9"), "2.0.9 aligns causal masks to the first key")])
def test_flash_attn_that_cannot_be_had_is_one_line(monkeypatch, device, package, expected):
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    with pytest.raises(UserError, match=f"policy.attention = flash_attn.* {expected}"):
        attention.refuse_missing_flash_attn(torch.device(device))


def test_work_grows_with_segments_not_with_rows():
    """Padding within a bucket stays below 2x of the exact number of query-key pairs, whatever is packed together."""
    batch = row(5)
    plan = attention.plan_row(batch, device=torch.device("cpu"), dtype=torch.float32, query_heads_per_key=1)
    segments = attention._segments(batch)
    assert sum(b.bias.numel() for b in plan.buckets) < 2 * int((segments.length * segments.keys).sum())


def test_positions_are_transformers(folder):
    """Prompts with several images and their continuation against HF's get_rope_index."""
    model = tiny.hf(folder)
    family = Qwen2_5_VL(folder, model.config)
    for group in tiny.groups():
        prompt = group.prompt
        ids = torch.tensor([[*prompt.expanded_ids, 5, 6, 7]])
        expected = model.model.get_rope_index(ids, (ids == tiny.IMAGE).int(), image_grid_thw=prompt.image_grid_thw)[0][:, 0]
        positions, after = family.positions(torch.tensor(prompt.expanded_ids), prompt.image_grid_thw, "here")
        assert torch.equal(torch.cat([positions, torch.arange(after, after + 3).expand(3, -1)], 1), expected)
