"""Sizes of a model from its folder's config.json alone: what the memory plan is computed from. No weights are read, nothing is built.

Counts of parameters are those of the policy (tests hold them against it), one pipeline stage and tensor rank at a time.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sophiavl_fast import config_checks, model_folder
from sophiavl_fast.config import Parallel
from sophiavl_fast.errors import UserError

SUPPORTED = ("qwen2_5_vl", "qwen3_vl", "internvl")


@dataclass(frozen=True, slots=True)
class Language:
    """query and key: heads times their width, before any tensor split."""

    layers: int
    hidden: int
    heads: int
    key_heads: int
    width: int
    ffn: int
    vocab: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool

    @property
    def query(self) -> int:
        return self.heads * self.width

    @property
    def key(self) -> int:
        return self.key_heads * self.width

    def layer(self, tensor: int) -> int:
        """Parameters of a layer on a tensor rank: norms are whole on every rank, all else is cut."""
        fused = self.query + 2 * self.key
        cut = self.hidden * (fused + self.query + 3 * self.ffn) + fused * self.qkv_bias
        return cut // tensor + 2 * self.hidden + 2 * self.width * self.qk_norm

    def vocabulary(self, tensor: int) -> int:
        """Parameters of the embedding, or of the head, on a tensor rank."""
        return -(-self.vocab // tensor) * self.hidden

    def largest(self, tensor: int) -> int:
        """The largest parameter's elements on a tensor rank: a vocabulary matrix or a fused gate and up projection."""
        return max(self.vocabulary(tensor), 2 * self.hidden * self.ffn // tensor)


@dataclass(frozen=True, slots=True)
class Vision:
    """The tower, whole on every rank of the first stage. `patch`: numbers a patch; `extra`: rows beside the patches for each of them."""

    family: str
    depth: int
    hidden: int
    ffn: int
    merge: int
    patch: int
    extra: float
    rms: bool           # RMSNorm in plain PyTorch, which keeps fp32 copies; else LayerNorm
    gated: bool
    qk_norm: bool
    deepstack: int
    parameters: int
    largest: int


@dataclass(frozen=True, slots=True)
class Sizes:
    language: Language
    vision: Vision

    def on_stage(self, stage: int, parallel: Parallel) -> tuple[int, int]:
        """(language, vision) parameters of a rank of a pipeline stage. A tied head has a copy of its own where the embedding is on another stage."""
        text, t, last = self.language, parallel.tensor, parallel.pipeline - 1
        count = layers_of(text.layers, parallel)[stage] * text.layer(t)
        count += text.vocabulary(t) * (stage == 0) + text.hidden * (stage == last)
        count += text.vocabulary(t) * (stage == last and not (text.tied and last == 0))
        return count, self.vision.parameters * (stage == 0)

    @property
    def total(self) -> int:
        return sum(self.on_stage(0, Parallel()))


def layers_of(layers: int, parallel: Parallel) -> list[int]:
    """Layers of each pipeline stage; what does not divide is spread as the policy's own message would have it."""
    return list(parallel.stages or config_checks.even_stages(layers, parallel.pipeline))


def check_layout(sizes: Sizes, parallel: Parallel) -> None:
    """Raises UserError for a layout that these sizes rule out, as the policy does once it has the model."""
    m = sizes.language
    config_checks.check_layout(parallel, heads=m.heads, key_heads=m.key_heads, ffn=m.ffn, layers=m.layers, deepstack=sizes.vision.deepstack,
                               family=sizes.vision.family)


def read(path: str | Path) -> Sizes:
    """Sizes of a model folder. Raises UserError for a folder without a usable config.json or of an unsupported family."""
    folder = Path(path)
    found = model_folder.open_config(folder)
    if found.model_type not in SUPPORTED:
        raise UserError(f"model.path = '{folder}': model_type '{found.model_type}' is not supported; supported: {', '.join(SUPPORTED)}")
    model_folder.refuse_partial(folder)
    return Sizes(_language(found), _internvl(found) if found.model_type == "internvl" else _qwen(found))


def _language(found: Any) -> Language:
    text = found.text_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Language(
        text.num_hidden_layers, text.hidden_size, text.num_attention_heads, text.num_key_value_heads, width, text.intermediate_size, text.vocab_size,
        bool(found.tie_word_embeddings), qkv_bias=text.model_type.startswith("qwen2"), qk_norm=text.model_type.startswith("qwen3"))


def _qwen(found: Any) -> Vision:
    """Qwen2.5-VL (RMSNorm, gated) and Qwen3-VL (LayerNorm, plain, learned positions, DeepStack's mergers)."""
    v, third = found.vision_config, found.model_type == "qwen3_vl"
    h, f, cell = v.hidden_size, v.intermediate_size, v.hidden_size * v.spatial_merge_size**2
    patch = v.in_channels * v.temporal_patch_size * v.patch_size**2
    attention = h * 3 * h + 3 * h + h * h + h
    mlp = (2 * h * f + f + h) if third else (3 * h * f + 2 * f + h)
    project = cell * cell + cell + cell * v.out_hidden_size + v.out_hidden_size
    deep = len(v.deepstack_visual_indexes) if third else 0
    count = patch * h + v.depth * (attention + mlp + 2 * h * (1 + third)) + project + h * (1 + third)
    if third:
        count += h + v.num_position_embeddings * h + deep * (project + 2 * cell)
    largest = max(cell * cell, cell * v.out_hidden_size, patch * h, h * f)
    return Vision(found.model_type, v.depth, h, f, v.spatial_merge_size, patch, 0.0, not third, not third, False, deep, count, largest)


def _internvl(found: Any) -> Vision:
    """A ViT with a class token a tile, layer scales, and a projector of two linear layers."""
    v, out = found.vision_config, found.text_config.hidden_size
    h, f, merge = v.hidden_size, v.intermediate_size, round(1 / found.downsample_ratio)
    (high, wide), (ph, pw) = _pair(v.image_size), _pair(v.patch_size)
    tile, patch, rms, cell = (high // ph) * (wide // pw), v.num_channels * ph * pw, v.norm_type == "rms_norm", h * merge**2
    norm = h if rms else 2 * h
    block = 4 * h * h + 3 * h * v.attention_bias + h + 2 * h * v.use_qk_norm + 2 * h * f + f + h + 2 * norm + 2 * h
    positions = (tile + 1) * h * bool(v.use_absolute_position_embeddings)
    count = h + patch * h + h + positions + h * bool(getattr(v, "use_mask_token", False)) + v.num_hidden_layers * block
    count += 0 if v.use_mean_pooling else 2 * h
    count += 2 * cell + cell * out + out + out * out + out
    return Vision(found.model_type, v.num_hidden_layers, h, f, merge, patch, 1 / tile, rms, False, bool(v.use_qk_norm), 0, count,
                  max(cell * out, out * out, h * f))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
