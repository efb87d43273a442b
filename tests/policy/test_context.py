"""A row cut over ranks: every token once, the work shared evenly, attention as in the whole row. (Whole models: test_layouts.py.)"""
from __future__ import annotations

import pytest
import torch
from test_attention import row

from sophiavl_fast.policy import attention, context

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_token_and_target_is_one_ranks(size):
    batch = row(1, multiple=2 * size)
    parts = [context.cut(batch, rank, size, None) for rank in range(size)]
    assert sorted(torch.cat([p.rows for p in parts]).tolist()) == list(range(len(batch.tokens)))
    assert sorted(torch.cat([p.targets for p in parts]).tolist()) == list(range(len(batch.target)))
    for part in parts:
        assert len(part.rows) == len(batch.tokens) // size
        assert torch.equal(part.local[part.rows], torch.arange(len(part.rows)))
        assert (part.local >= 0).sum() == len(part.rows)
    assert torch.equal(torch.cat([p.rows for p in parts])[parts[0].gathered], torch.arange(len(batch.tokens)))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_attention_over_slices_is_that_of_the_whole_row(size, seed):
    batch = row(seed, multiple=2 * size)
    g = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(len(batch.tokens), heads, 16, generator=g) for heads in (4, 2, 2))
    make = lambda part: attention.plan_row(batch, device=CPU, dtype=torch.float32, query_heads_per_key=2, part=part)
    whole = attention.attend(query, key, value, make(None))
    parts = [context.cut(batch, rank, size, None) for rank in range(size)]
    order = torch.cat([p.rows for p in parts])
    for part in parts:
        found = attention.attend(query[part.rows], key[order], value[order], make(part))
        assert (found - whole[part.rows]).abs().max() < 1e-6


@pytest.mark.parametrize("size", [2, 4])
def test_flash_layout_of_a_slice_names_the_same_keys(size):
    """The variable-length kernel's table, read by hand: each query's keys are those that the whole row's table gives it."""
    batch = row(5, multiple=2 * size)
    seen = _keys_of_each_query(attention._segments(batch), torch.arange(len(batch.tokens)))
    for rank in range(size):
        part = context.cut(batch, rank, size, None)
        mine = _keys_of_each_query(attention._within(attention._segments(batch), part), part.rows)
        assert mine == {r: seen[r] for r in part.rows.tolist()}


def _keys_of_each_query(segments, rows):
    keys, ends = attention._key_rows(segments).tolist(), segments.keys.cumsum(0).tolist()
    found = {}
    for begin, length, size, end in zip(segments.begin.tolist(), segments.length.tolist(), segments.keys.tolist(), ends, strict=True):
        for i in range(length):
            found[int(rows[begin + i])] = keys[end - size:end - length + i + 1]
    return found


def test_work_is_shared_evenly_over_one_long_response():
    """Keys summed over queries: a plain cut in two would give the later half three times the earlier one's."""
    import tiny
    from test_attention import Text

    from sophiavl_fast.policy.packing import pack

    g = torch.Generator().manual_seed(0)
    (batch,) = pack([tiny.group(g, "0", [], [4000], text=90)], None, Text, share_prompt=True, budget=10**6, multiple=4)
    work = []
    for rank in range(2):
        s = attention._within(attention._segments(batch), context.cut(batch, rank, 2, None))
        work.append(int((s.length * (s.keys - s.length) + s.length * (s.length + 1) // 2).sum()))
    assert max(work) < 1.05 * min(work)
