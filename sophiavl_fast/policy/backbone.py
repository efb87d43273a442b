"""The language model class: megatron-core's GPTModel, stopped before its output layer.

Everything that depends on the class is in this file, so that another one (HybridModel, from megatron-core 0.19 on) is a local change.
"""
from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from sophiavl_fast.policy.attention import GroupAttention
from sophiavl_fast.policy.deepstack import DeepStackLayer
from sophiavl_fast.policy.gated_mlp import use_gated_mlp
from sophiavl_fast.policy.norm import RMSNorm
from sophiavl_fast.policy.rope import Rope


class Backbone(GPTModel):
    """[S] tokens (or hidden states) -> hidden states after the final norm; the head is applied to chosen rows by the caller."""

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


def build_backbone(config: TransformerConfig, *, padded_vocab: int, tied: bool, first_stage: bool, last_stage: bool,
                   rope: tuple[float, list[int]], deepstack: bool, device: torch.device) -> Backbone:
    """This stage's part of the language model. rope: base and axis of each frequency; deepstack: the first layers add image features."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = GroupAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if deepstack:
        layer.module = DeepStackLayer
    layers = TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)
    model = Backbone(
        config, layers, vocab_size=padded_vocab, max_sequence_length=0, pre_process=first_stage, post_process=last_stage, parallel_output=True,
        share_embeddings_and_output_weights=tied, scatter_embedding_sequence_parallel=False, position_embedding_type="mrope",
    )
    model.rotary_pos_emb = Rope(*rope, device)
    use_gated_mlp(model)
    return model
