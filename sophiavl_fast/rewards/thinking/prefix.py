"""Forward passes of a Hugging Face vision-language model over many rows that share a few prefixes.

The responses of a group share question and images: that prefix is computed once (vision tower included), and its keys and
values are read by each response's own tokens. Rows are padded on the left, so that the last column is every row's last
token; position ids are explicit, so that padding changes nothing.
"""
from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class State:
    """Rows computed so far: keys and values, mask [B, S] of real tokens, next position [B], logits [B, V] of the last token."""

    cache: Any
    mask: Tensor
    position: Tensor
    logits: Tensor

    def select(self, rows: Sequence[int]) -> State:
        """These rows, repeated or reordered, as a state of their own."""
        index = torch.tensor(rows, device=self.mask.device)
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(index)
        return State(cache, self.mask[index], self.position[index], self.logits[index])


class PrefixModel:
    """A frozen model and its processor; `prefill` computes prefixes, `extend` goes on from them with text."""

    def __init__(self, model: Any, processor: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self._pad = processor.tokenizer.pad_token_id or 0
        self._image_token_id = processor.image_token_id
        self._rope_index = getattr(model.model, "get_rope_index", None)

    def prefill(self, prefixes: Sequence[list[int]], vision: dict[str, Tensor]) -> State:
        """Compute prefixes (image tokens expanded); `vision`: pixels and grids of their images, in order, {} without images."""
        ids, mask = self._padded(prefixes)
        if self._rope_index is not None:
            types = (ids == self._image_token_id).int()
            positions = self._rope_index(ids, types, image_grid_thw=vision.get("image_grid_thw"), attention_mask=mask)[0]
            following = positions.amax((0, 2)) + 1
        else:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            following = mask.sum(-1)
        vision = {k: v.to(self.device) for k, v in vision.items()}
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1, **vision)
        return State(out.past_key_values, mask, following, out.logits[:, -1])

    def extend(self, state: State, rows: Sequence[list[int]], *, keep: int = 1) -> tuple[State, Tensor]:
        """Go on with text tokens, one list a row; returns the new state and the logits [B, keep, V] of the last `keep` columns.

        The given state's cache is used up.
        """
        ids, new = self._padded(rows)
        steps = (new.cumsum(-1) - 1).clamp_min(0)
        positions = state.position[:, None] + steps
        mask = torch.cat([state.mask, new], dim=1)
        shaped = positions.expand(3, -1, -1) if self._rope_index is not None else positions
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=shaped, past_key_values=state.cache, use_cache=True, logits_to_keep=keep)
        return State(out.past_key_values, mask, state.position + new.sum(-1), out.logits[:, -1]), out.logits

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        ids = torch.tensor([[self._pad] * (width - len(r)) + r for r in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=self.device)
        return ids, mask
