"""debug.compare_hf: recompute log-probs with plain transformers, from the live weights, and compare."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sophiavl_fast.types import Batch

if TYPE_CHECKING:
    from sophiavl_fast.policy.policy import Policy


class HuggingFace:
    """The same model in transformers, kept in memory on the first rank and refilled from the policy's weights."""

    def __init__(self, policy: Policy) -> None:
        from transformers import AutoModelForImageTextToText

        self.policy = policy
        self.model: Any = None
        if policy.is_lead:  # eval: the policy has no dropout, whatever config.json says
            self.model = AutoModelForImageTextToText.from_config(policy.family.hf_config, dtype=policy.model.config.params_dtype).to(policy.device).eval()

    @torch.no_grad()
    def difference(self, batches: list[Batch], logprobs: list[Tensor]) -> float:
        """Largest |policy - Hugging Face| log-prob over the batches' targets, one unpacked row a response, NaN where any is; every rank calls it.

        Peers of a lead return 0. Slow on purpose: prompts and images are computed anew for every response.
        """
        self._refill()
        worst = torch.zeros((), device=self.policy.device)
        for batch, logprob in zip(batches, logprobs, strict=True):
            if self.model is not None:
                worst = torch.maximum(worst, (self._logprobs(batch.to(self.policy.device)) - logprob).abs().max())   # Python's max may drop a NaN
        return worst.item()

    def _refill(self) -> None:
        state = self.model.state_dict() if self.model is not None else {}
        for name, tensor in self.policy.weights():
            if self.model is not None:
                state[self.policy.family.in_memory(name)].copy_(tensor)

    def _logprobs(self, batch: Batch) -> Tensor:
        """[T] fp32 of a row's targets."""
        images = self._images(batch)
        found = []
        for i, g in enumerate(batch.group_of.tolist()):
            start, length = int(batch.group_start[g]), int(batch.prompt_len[g])
            target = batch.target[batch.cu_seqlens[i]:batch.cu_seqlens[i + 1]]
            ids = torch.cat([batch.tokens[start:start + length], target])[None]
            logits = self.model(input_ids=ids, **self.policy.family.hf_inputs(ids, *images[g])).logits[0, length - 1:-1].float()
            logits[:, self.policy.banned_ids] = float("-inf")
            found.append((logits / self.policy.temperature).log_softmax(-1).gather(1, target[:, None])[:, 0])
        return torch.cat(found)

    def _images(self, batch: Batch) -> list[tuple[Tensor | None, Tensor | None]]:
        """Pixels and grids of each group, by counting image tokens against the grids."""
        family, image, patch = self.policy.family, 0, 0
        inputs: list[tuple[Tensor | None, Tensor | None]] = []
        for g in range(len(batch.prompt_len)):
            start = int(batch.group_start[g])
            left = int((batch.tokens[start:start + int(batch.prompt_len[g])] == family.image_token_id).sum())
            first, pixels = image, patch
            while left > 0:
                grid = batch.image_grid_thw[image:image + 1]  # type: ignore[index]
                left -= family.image_tokens(grid)[0]
                image, patch = image + 1, patch + int(grid.prod())
            inputs.append((batch.pixel_values[pixels:patch], batch.image_grid_thw[first:image]) if image > first else (None, None))  # type: ignore[index]
        return inputs
