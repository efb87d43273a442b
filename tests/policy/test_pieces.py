"""Boxes of published tensors against the mapping: any stretch of any rank's parameter, put back where its boxes say, gives the tensors it was cut from."""
import random
from math import prod

import pytest
import torch

from sophiavl_fast.policy import mapping
from sophiavl_fast.policy.mapping import Heads, Rule
from sophiavl_fast.policy.pieces import boxes, split

HEADS = Heads(query=12, key=4, width=3, vocab=37, padded_vocab=40)
# kind -> published names and shapes
TENSORS = {
    "whole": {"w": (5, 2, 3, 4)}, "row": {"o": (6, 8)}, "vocab": {"e": (37, 5)}, "gated": {"g": (8, 6), "u": (8, 6)},
    "qkv": {"q": (36, 7), "k": (12, 7), "v": (12, 7)},
}
TENSORS["qkv bias"] = {name: shape[:1] for name, shape in TENSORS["qkv"].items()}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", TENSORS)
def test_every_value_lies_in_one_box_and_in_its_place(name, size):
    kind, draw = name.split()[0], random.Random(f"{name} {size}")
    published = {n: torch.arange(prod(s)).view(s).float() + 1000 * i for i, (n, s) in enumerate(TENSORS[name].items())}
    for _ in range(20):
        found = {n: torch.full_like(t, -1) for n, t in published.items()}
        for rank in range(1 if kind == "whole" else size):
            part = mapping.shard(kind, list(published.values()), HEADS, size, rank).contiguous()
            cuts = sorted(draw.choices(range(part.numel() + 1), k=draw.randrange(6)))
            for begin, end in zip([0, *cuts], [*cuts, part.numel()], strict=True):
                flat = part.view(-1)[begin:end]
                for box in boxes(Rule(kind, tuple(published)), tuple(published), tuple(part.shape), flat, begin, HEADS, size, rank):
                    assert box.whole == tuple(published[box.name].shape)
                    place = found[box.name][tuple(slice(o, o + s) for o, s in zip(box.offset, box.data.shape, strict=True))]
                    assert (place == -1).all() and place.shape == box.data.shape
                    place.copy_(box.data)
                    assert box.data.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
        for n, tensor in published.items():
            assert torch.equal(found[n], tensor), (n, cuts)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (2, 1, 3, 2)])
def test_split_is_exact_and_frugal(shape):
    """All stretches of small tensors: the boxes' values in order, and never more than two partial ones on each axis but the first, and one whole."""
    index = torch.arange(prod(shape)).view(shape)
    for begin in range(prod(shape) + 1):
        for end in range(begin, prod(shape) + 1):
            found = list(split(shape, begin, end))
            values = [index[tuple(slice(o, o + s) for o, s in zip(offset, sizes, strict=True))].reshape(-1) for offset, sizes in found]
            assert torch.cat([torch.zeros(0, dtype=torch.long), *values]).tolist() == list(range(begin, end))
            assert len(found) <= 2 * len(shape) - 1
    assert list(split(shape, 0, prod(shape))) == [((0,) * len(shape), shape)]
    assert not list(split(shape, 4, 2))
