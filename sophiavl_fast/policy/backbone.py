"""The language model class: megatron-core's GPTModel, stopped before its output layer.

Everything that depends on the class is in this file, so that another one (HybridModel, from megatron-core 0.19 on) is a local change.
"""
from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from sophiavl_fast.policy.attention import GroupAttention
from sophiavl_fast.policy.norm import RMSNorm


class Backbone(GPTModel):
    """[S] tokens (or hidden states) -> hidden states after the final norm; the head is applied to chosen rows by the caller."""

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


def build_backbone(config: TransformerConfig, *, padded_vocab: int, tied: bool, first_stage: bool, last_stage: bool, rope: dict[str, Any]) -> Backbone:
    """This stage's part of the language model."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = GroupAttention
    layers = TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)
    return Backbone(
        config, layers, vocab_size=padded_vocab, pre_process=first_stage, post_process=last_stage, parallel_output=True,
        share_embeddings_and_output_weights=tied, scatter_embedding_sequence_parallel=False, **rope,
    )
