"""What every family shares: a Qwen- or Llama-style language model, names, and the check of image tokens against features.

A family is a subclass in a file of its own: it names its prefixes, its vision tower, and its rope positions where they are
not simply 0, 1, 2. `families/__init__.py` lists it by the `model_type` of its config.json.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophiavl_fast import model_folder
from sophiavl_fast.errors import EngineError, UserError
from sophiavl_fast.policy.mapping import Folder, Rule

QKV_BIAS, QK_NORM = ("qwen2", "qwen2_5_vl_text"), ("qwen3", "qwen3_vl_text")
TEXT_MODELS = (*QKV_BIAS, *QK_NORM, "llama")

LAYER = {
    "self_attention.linear_qkv.weight": Rule("qkv", ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")),
    "self_attention.linear_qkv.bias": Rule("qkv", ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")),
    "self_attention.q_layernorm.weight": Rule("whole", ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": Rule("whole", ("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": Rule("row", ("self_attn.o_proj.weight",)),
    "mlp.linear_fc1.weight": Rule("gated", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": Rule("row", ("mlp.down_proj.weight",)),
    "input_layernorm.weight": Rule("whole", ("input_layernorm.weight",)),
    "pre_mlp_layernorm.weight": Rule("whole", ("post_attention_layernorm.weight",)),
}


class Family:
    """Names, shapes and positions of one architecture. Tensor names are those of the published checkpoints ("published").

    renamed: (published prefix, prefix in transformers' state_dict) of every name that differs between the two.
    language, vision_tower, head: published prefixes and name. position_axes: rows of a batch's position ids.
    described: fields of config.json that decide what the model computes, as they were before anything is built.
    deepstack: how many of the first layers add image features to their output; they must lie on the first pipeline stage.
    """

    name: str
    renamed: tuple[tuple[str, str], ...] = ()
    language = "model.language_model."
    vision_tower = "model.visual."
    head_name = "lm_head.weight"
    position_axes = 1
    deepstack = 0

    def __init__(self, folder: Path, hf_config: Any) -> None:
        self.folder, self.hf_config, self.text = folder, hf_config, hf_config.text_config
        self.described = model_folder.described(hf_config)
        self._check_text()
        self.vocab_size: int = self.text.vocab_size
        self.hidden_size: int = self.text.hidden_size
        self.image_token_id: int = hf_config.image_token_id
        self.video_token_id: int | None = getattr(hf_config, "video_token_id", None)
        self.embedding_name = f"{self.language}embed_tokens.weight"
        self.tied: bool = hf_config.tie_word_embeddings and not self._own_head()
        vision = hf_config.vision_config
        self.vision_depth: int = getattr(vision, "depth", None) or vision.num_hidden_layers
        self.vision_hidden_size: int = vision.hidden_size

    def _check_text(self) -> None:
        text, where = self.text, f"model.path = '{self.folder}'"
        if text.model_type not in TEXT_MODELS:
            raise UserError(f"{where}: a {self.name} with a '{text.model_type}' language model is not supported; supported: {', '.join(TEXT_MODELS)}")
        if getattr(text, "use_sliding_window", False):
            raise UserError(f"{where}: sliding-window attention (use_sliding_window) is not supported")
        if getattr(text, "attention_bias", False) or getattr(text, "mlp_bias", False) or text.hidden_act != "silu":
            raise UserError(f"{where}: attention_bias, mlp_bias and hidden_act other than 'silu' are not supported in the language model")
        kind = text.rope_parameters.get("rope_type", "default")
        if kind not in ("default", "mrope", "dynamic"):
            raise UserError(f"{where}: rope_type '{kind}' is not supported; supported: default, dynamic (as default, up to max_position_embeddings)")

    def _own_head(self) -> bool:
        """Whether the folder holds a head of its own although its config ties it (transformers then keeps the two apart)."""
        try:
            folder = Folder(self.folder, self.published)
        except UserError:  # no weights there: the loader says so
            return False
        return self.head_name in folder and not torch.equal(folder(self.head_name), folder(self.embedding_name))

    # -- language model

    def transformer(self) -> dict[str, Any]:
        """Fields of megatron's TransformerConfig that the architecture decides."""
        text = self.text
        return {
            "num_layers": text.num_hidden_layers, "hidden_size": text.hidden_size, "num_attention_heads": text.num_attention_heads,
            "num_query_groups": text.num_key_value_heads, "ffn_hidden_size": text.intermediate_size, "kv_channels": self.head_width,
            "normalization": "RMSNorm", "layernorm_epsilon": text.rms_norm_eps, "gated_linear_unit": True, "activation_func": F.silu,
            "add_bias_linear": False, "add_qkv_bias": text.model_type in QKV_BIAS, "qk_layernorm": text.model_type in QK_NORM,
        }

    @property
    def head_width(self) -> int:
        return getattr(self.text, "head_dim", None) or self.text.hidden_size // self.text.num_attention_heads

    def rope(self) -> tuple[float, list[int]]:
        """(base, the position axis that each of the head_width / 2 frequencies turns with)."""
        return self.text.rope_parameters["rope_theta"], [0] * (self.head_width // 2)

    # -- names

    def rule(self, name: str, first_layer: int) -> Rule:
        """How a parameter of the policy (its local megatron name) lies in the checkpoint's tensors."""
        part, _, rest = name.partition(".")
        if part == "vision":
            return Rule("whole", (f"{self.vision_tower}{rest}",))
        top = {"embedding.word_embeddings.weight": Rule("vocab", (self.embedding_name,)), "output_layer.weight": Rule("vocab", (self.head_name,)),
               "decoder.final_layernorm.weight": Rule("whole", (f"{self.language}norm.weight",))}
        if rest in top:
            return top[rest]
        _, _, index, suffix = rest.split(".", 3)
        found = LAYER[suffix]
        return Rule(found.kind, tuple(f"{self.language}layers.{int(index) + first_layer}.{n}" for n in found.names))

    def published(self, name: str) -> str:
        """The published name of a tensor that may be stored under its in-memory name."""
        return next((new + name[len(old):] for new, old in self.renamed if name.startswith(old)), name)

    def in_memory(self, name: str) -> str:
        """The name of a published tensor in transformers' state_dict."""
        return next((new + name[len(old):] for old, new in self.renamed if name.startswith(old)), name)

    # -- vision

    def vision(self, dtype: torch.dtype, device: torch.device, recompute: bool) -> nn.Module:
        """The vision tower, weights not initialised; its parameters' names follow `vision_tower`."""
        raise NotImplementedError

    def image_features(self, tower: nn.Module, pixels: Tensor, grid: Tensor) -> tuple[Tensor, list[Tensor]]:
        """pixels [N, C], grid [I, 3] -> ([image tokens, H], the same for each of the `deepstack` first layers)."""
        raise NotImplementedError

    @property
    def merge(self) -> int:
        """Patches a side that become one token."""
        raise NotImplementedError

    def image_tokens(self, grid: Tensor) -> list[int]:
        """grid [I, 3] -> tokens of each image after merging."""
        return (grid.prod(-1) // self.merge**2).tolist()

    def hf_inputs(self, tokens: Tensor, pixels: Tensor | None, grid: Tensor | None) -> dict[str, Tensor]:
        """What transformers' forward wants beside input_ids [B, S] for these images (None: without any)."""
        raise NotImplementedError

    # -- positions

    def positions(self, tokens: Tensor, grid: Tensor | None, where: str) -> tuple[Tensor, int]:
        """Rope positions of a prompt and of what follows it: here 0, 1, 2, ...

        tokens [P] int64, image tokens expanded; grid [I, 3] or None. Returns (positions [axes, P] int64, the first position
        after the prompt). Raises EngineError naming `where` when image tokens and grid disagree.
        """
        self.image_starts(tokens, grid, where)
        return torch.arange(len(tokens))[None], len(tokens)

    def image_starts(self, tokens: Tensor, grid: Tensor | None, where: str) -> list[int]:
        """The first token of each image. Raises EngineError where the prompt's image tokens are not what its images give, or for a video."""
        if self.video_token_id is not None and bool((tokens == self.video_token_id).any()):
            raise EngineError(f"{where}: the prompt holds a video; only images are supported")
        image = tokens == self.image_token_id
        sizes = self.image_tokens(grid) if grid is not None else []
        if int(image.sum()) != sum(sizes):
            raise EngineError(f"{where}: the prompt holds {int(image.sum())} image tokens, but its images give {sum(sizes)} features")
        places, found, done = image.nonzero()[:, 0].tolist(), [], 0
        for i, size in enumerate(sizes):
            if places[done + size - 1] - places[done] != size - 1:
                raise EngineError(f"{where}: image {i} has {size} features, but its tokens in the prompt are interrupted")
            found.append(places[done])
            done += size
        return found


def quiet(config: Any) -> Any:
    """A vision config without dropout, changed in place: what is trained is what was sampled from."""
    for key in vars(config):
        if "dropout" in key and isinstance(getattr(config, key), (int, float)):
            setattr(config, key, 0.0)
    return config
