"""What Qwen2.5-VL and Qwen3-VL share: pixels as flat patches with a (t, h, w) grid, and 3-D rope positions."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sophiavl_fast.compat.patch_embedding import use_products
from sophiavl_fast.errors import UserError
from sophiavl_fast.policy.families.base import Family, quiet


class QwenVL(Family):
    """The common part; a subclass names the tower's class and which frequency turns with which axis."""

    position_axes = 3

    def __init__(self, folder: Path, hf_config: Any) -> None:
        super().__init__(folder, hf_config)
        sections, half = self.text.rope_parameters.get("mrope_section"), self.head_width // 2
        if not isinstance(sections, (list, tuple)) or len(sections) != 3 or not all(isinstance(s, int) for s in sections) or sum(sections) != half:
            raise UserError(f"model.path = '{folder}': config.json's rope parameters have mrope_section = {sections}; a {self.name} needs three sizes "
                            f"(time, height, width) that sum to {half}, half the head width")

    @property
    def merge(self) -> int:
        return self.hf_config.vision_config.spatial_merge_size

    def tower_class(self) -> Any:
        """transformers' class of the vision tower."""
        raise NotImplementedError

    def vision(self, dtype: torch.dtype, device: torch.device, recompute: bool) -> nn.Module:
        from transformers.initialization import no_init_weights

        with no_init_weights():
            tower = self.tower_class()._from_config(quiet(self.hf_config.vision_config), attn_implementation="sdpa", dtype=dtype)
        use_products(tower)
        if recompute:
            tower.gradient_checkpointing_enable({"use_reentrant": False})
        return tower.to(device).train()

    def image_features(self, tower: nn.Module, pixels: Tensor, grid: Tensor) -> tuple[Tensor, list[Tensor]]:
        return tower(pixels, grid_thw=grid).pooler_output, []

    def hf_inputs(self, tokens: Tensor, pixels: Tensor | None, grid: Tensor | None) -> dict[str, Tensor]:
        types = {"mm_token_type_ids": (tokens == self.image_token_id).int()}
        return types if pixels is None or grid is None else types | {"pixel_values": pixels, "image_grid_thw": grid}

    def positions(self, tokens: Tensor, grid: Tensor | None, where: str) -> tuple[Tensor, int]:
        """Text advances all three axes by one a token; an image spans its grid from the current position, and text goes on
        after its longer side. Arguments, result and errors as in Family."""
        parts, at, position = [], 0, 0
        for i, first in enumerate(self.image_starts(tokens, grid, where)):
            parts.append(torch.arange(position, position + first - at).expand(3, -1))
            position += first - at
            t, h, w = (int(x) for x in grid[i])  # type: ignore[index]
            h, w = h // self.merge, w // self.merge
            box = torch.stack(torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")).flatten(1)
            parts.append(box + position)
            at, position = first + t * h * w, position + max(h, w)
        parts.append(torch.arange(position, position + len(tokens) - at).expand(3, -1))
        return torch.cat(parts, 1), position + len(tokens) - at
