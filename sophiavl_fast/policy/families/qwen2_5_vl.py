"""Qwen2.5-VL: a Qwen2 language model with sectioned 3-D rope and a windowed vision tower (arXiv 2502.13923)."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophiavl_fast.errors import EngineError, UserError
from sophiavl_fast.policy.mapping import Rule

LAYER = {
    "self_attention.linear_qkv.weight": Rule("qkv", ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")),
    "self_attention.linear_qkv.bias": Rule("qkv", ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")),
    "self_attention.linear_proj.weight": Rule("row", ("self_attn.o_proj.weight",)),
    "mlp.linear_fc1.weight": Rule("gated", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": Rule("row", ("mlp.down_proj.weight",)),
    "input_layernorm.weight": Rule("whole", ("input_layernorm.weight",)),
    "pre_mlp_layernorm.weight": Rule("whole", ("post_attention_layernorm.weight",)),
}
TOP = {
    "embedding.word_embeddings.weight": Rule("vocab", ("model.embed_tokens.weight",)),
    "decoder.final_layernorm.weight": Rule("whole", ("model.norm.weight",)),
    "output_layer.weight": Rule("vocab", ("lm_head.weight",)),
}


class Qwen2_5_VL:
    """Names, shapes and positions of Qwen2.5-VL. Tensor names are those of the published checkpoints."""

    name = "qwen2_5_vl"
    position_axes = 3

    def __init__(self, folder: Path, hf_config: Any) -> None:
        text = hf_config.text_config
        if text.use_sliding_window:
            raise UserError(f"model.path = '{folder}': sliding-window attention (use_sliding_window) is not supported")
        self.folder, self.hf_config = folder, hf_config
        self.vocab_size: int = text.vocab_size
        self.hidden_size: int = text.hidden_size
        self.tied: bool = hf_config.tie_word_embeddings
        self.image_token_id: int = hf_config.image_token_id
        self.merge: int = hf_config.vision_config.spatial_merge_size

    # -- language model

    def transformer(self) -> dict[str, Any]:
        """Fields of megatron's TransformerConfig that the architecture decides."""
        text = self.hf_config.text_config
        return {
            "num_layers": text.num_hidden_layers, "hidden_size": text.hidden_size, "num_attention_heads": text.num_attention_heads,
            "num_query_groups": text.num_key_value_heads, "ffn_hidden_size": text.intermediate_size,
            "kv_channels": text.hidden_size // text.num_attention_heads, "normalization": "RMSNorm", "layernorm_epsilon": text.rms_norm_eps,
            "gated_linear_unit": True, "activation_func": F.silu, "add_bias_linear": False, "add_qkv_bias": True,
            "mrope_section": list(text.rope_parameters["mrope_section"]), "rotary_interleaved": False,
        }

    def rope(self) -> dict[str, Any]:
        """Arguments of megatron's GPTModel for positions."""
        text = self.hf_config.text_config
        return {"position_embedding_type": "mrope", "rotary_base": text.rope_parameters["rope_theta"],
                "max_sequence_length": text.max_position_embeddings}

    # -- names

    def rule(self, name: str, first_layer: int) -> Rule:
        """How a parameter of the policy (its local megatron name) lies in the checkpoint's tensors."""
        part, _, rest = name.partition(".")
        if part == "vision":
            return Rule("whole", (f"visual.{rest}",))
        if rest in TOP:
            return TOP[rest]
        _, _, index, suffix = rest.split(".", 3)
        found = LAYER[suffix]
        return Rule(found.kind, tuple(f"model.layers.{int(index) + first_layer}.{n}" for n in found.names))

    def published(self, name: str) -> str:
        """The checkpoint name of a tensor that newer transformers versions may have saved under their in-memory name."""
        return name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1)

    def in_memory(self, name: str) -> str:
        """The name of a checkpoint tensor in transformers' state_dict."""
        if name.startswith("visual."):
            return f"model.{name}"
        return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name

    # -- vision

    def vision(self, dtype: torch.dtype, device: torch.device, recompute: bool) -> nn.Module:
        """The vision tower, weights not initialised: forward(pixels [N, C], grid [I, 3]) gives [image tokens, H] as `pooler_output`."""
        from transformers.initialization import no_init_weights
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Tower

        with no_init_weights():
            tower = Tower._from_config(self.hf_config.vision_config, attn_implementation="sdpa", dtype=dtype)
        if recompute:
            tower.gradient_checkpointing_enable({"use_reentrant": False})
        return tower.to(device).train()

    def image_tokens(self, grid: Tensor) -> list[int]:
        """grid [I, 3] patches a side -> tokens of each image after merging."""
        return (grid.prod(-1) // self.merge**2).tolist()

    # -- positions

    def positions(self, tokens: Tensor, grid: Tensor | None, where: str) -> tuple[Tensor, int]:
        """Rope positions of a prompt and of what follows it.

        tokens [P] int64, image tokens expanded; grid [I, 3] or None. Text advances all three axes by one a token; an
        image spans its grid from the current position, and text goes on after its longer side.
        Returns (positions [3, P] int64, the first position after the prompt). Raises EngineError naming `where` when
        image tokens and grid disagree.
        """
        image = tokens == self.image_token_id
        sizes = self.image_tokens(grid) if grid is not None else []
        if int(image.sum()) != sum(sizes):
            raise EngineError(f"{where}: the prompt holds {int(image.sum())} image tokens, but its images give {sum(sizes)} features")
        parts, at, position = [], 0, 0
        starts = image.nonzero()[:, 0].tolist()
        for i, size in enumerate(sizes):
            first = starts[sum(sizes[:i])]
            parts.append(torch.arange(position, position + first - at).expand(3, -1))
            position += first - at
            t, h, w = (int(x) for x in grid[i])  # type: ignore[index]
            h, w = h // self.merge, w // self.merge
            box = torch.stack(torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")).flatten(1)
            parts.append(box + position)
            at, position = first + size, position + max(h, w)
            if not bool(image[first:at].all()):
                raise EngineError(f"{where}: image {i} has {size} features, but its tokens in the prompt are interrupted")
        parts.append(torch.arange(position, position + len(tokens) - at).expand(3, -1))
        return torch.cat(parts, 1), position + len(tokens) - at
