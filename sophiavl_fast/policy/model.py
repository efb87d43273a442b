"""The vision-language model: a vision tower on the first stage, the language model, and the log-prob head on the last."""
from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from sophiavl_fast import config_checks
from sophiavl_fast.config import Config
from sophiavl_fast.policy import mapping
from sophiavl_fast.policy.attention import RowPlan
from sophiavl_fast.policy.backbone import build_backbone
from sophiavl_fast.policy.deepstack import attach
from sophiavl_fast.policy.distributed import Layout
from sophiavl_fast.policy.families import Family
from sophiavl_fast.types import Batch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class VisionLanguageModel(MegatronModule):
    """This rank's part of the policy. On the last stage forward gives the hidden states [T, H] that predict the row's targets."""

    def __init__(self, config: TransformerConfig, family: Family, layout: Layout, padded_vocab: int, recompute: bool) -> None:
        super().__init__(config=config)
        self.layout, self.family = layout, family
        self.share_embeddings_and_output_weights = family.tied
        self.vision = family.vision(config.params_dtype, layout.device, recompute) if layout.first_stage else None
        self.language = build_backbone(config, padded_vocab=padded_vocab, tied=family.tied, first_stage=layout.first_stage,
                                       last_stage=layout.last_stage, rope=family.rope(), deepstack=family.deepstack > 0, device=layout.device)
        self.model_type = self.language.model_type
        self.pre_process, self.post_process = layout.first_stage, layout.last_stage  # megatron's names, read by its pipeline schedule

    def set_input_tensor(self, tensor: Tensor) -> None:
        self.language.set_input_tensor(tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        return self.language.shared_embedding_or_output_weight()

    def head_weight(self) -> Tensor:
        """[padded V / tp, H] rows of the output projection on the last stage."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.language.output_layer.weight

    def forward(self, batch: Batch, plan: RowPlan) -> Tensor:
        tokens = batch.tokens[None]
        positions = batch.position_ids if plan.slice is None else batch.position_ids[:, plan.slice.rows]
        hidden = self.language(input_ids=tokens, position_ids=positions[:, None], attention_mask=None,
                               decoder_input=self._embed(tokens, batch, plan) if self.layout.first_stage else None, packed_seq_params=plan)
        return self._predictors(hidden, batch.predictor, plan) if self.layout.last_stage else hidden

    def _embed(self, tokens: Tensor, batch: Batch, plan: RowPlan) -> Tensor:
        """[S, 1, H] embeddings with image features in place, this rank's slice of S under context and sequence parallelism.

        Features for the first layers' outputs go into the plan.
        """
        deep: list[Tensor] = []
        embedded = self.language.embedding(input_ids=tokens, position_ids=None)
        if batch.pixel_values is not None:
            assert self.vision is not None and batch.image_grid_thw is not None
            features, deep = self.family.image_features(self.vision, batch.pixel_values.to(embedded.dtype), batch.image_grid_thw)
            rows = (batch.tokens == self.family.image_token_id).nonzero()[:, 0]
            embedded = embedded.index_copy(0, rows, features[:, None].to(embedded.dtype))
        if plan.slice is not None:
            embedded = embedded.index_select(0, plan.slice.rows)
            if deep:
                here = plan.slice.local[rows]
                rows, deep = here[here >= 0], [level[here >= 0] for level in deep]
        if self.config.sequence_parallel:
            embedded = scatter_to_sequence_parallel_region(embedded)
        if deep:
            embedded, plan.deepstack = attach(embedded, rows, deep, rank=dist.get_rank(self.layout.tp_group), sequence_parallel=self.config.sequence_parallel)
        return embedded

    def _predictors(self, hidden: Tensor, rows: Tensor, plan: RowPlan) -> Tensor:
        """Hidden states at `rows`, those of them that this rank holds under context parallelism.

        Each tensor rank's log-prob gives its part of their gradient: here it is summed, once.
        """
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        if plan.slice is not None:
            rows = plan.slice.local[rows[plan.slice.targets]]
        chosen = hidden[:, 0].index_select(0, rows)
        return chosen if self.config.sequence_parallel else copy_to_tensor_model_parallel_region(chosen)


def build_model(config: Config, family: Family, layout: Layout) -> tuple[VisionLanguageModel, mapping.Heads]:
    """The model with the folder's weights. Raises UserError where sizes do not divide over the tensor or pipeline ranks."""
    fields, stages = family.transformer(), check_layout(family, config)
    dtype = DTYPES[config.model.dtype]
    on_cpu = layout.device.type == "cpu"
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1} if config.policy.recompute else {}
    transformer = TransformerConfig(
        **fields, **recompute, **stages, mrope_section=[], hidden_dropout=0.0, attention_dropout=0.0,
        params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tensor, pipeline_model_parallel_size=layout.pipeline, context_parallel_size=layout.context,
        sequence_parallel=layout.sequence,
        variable_seq_lengths=layout.pipeline > 1, moe_token_dispatcher_type="alltoall",  # megatron wants the latter with the former
        batch_p2p_comm=not on_cpu, use_cpu_initialization=on_cpu, perform_initialization=False, calculate_per_token_loss=True,
        bias_activation_fusion=False, masked_softmax_fusion=False, bias_dropout_fusion=False, apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
    )
    padded = -(-family.vocab_size // layout.tensor) * layout.tensor
    heads = mapping.Heads(fields["num_attention_heads"], fields["num_query_groups"], fields["kv_channels"], family.vocab_size, padded)
    model = VisionLanguageModel(transformer, family, layout, padded, config.policy.recompute)
    mapping.load(model, family, heads, layout)
    for _, rule, parameter in mapping.parameters(model, family):
        if rule.kind != "whole":  # megatron marks shards as it initialises them; unmarked ones count once in the gradient norm
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    _mark_vision(model, config.model.freeze_vision, average=layout.tensor > 1 and not on_cpu)
    return model, heads


def _mark_vision(model: VisionLanguageModel, frozen: bool, average: bool) -> None:
    """The tower is computed on every tensor rank alike; on GPUs rounding may differ, so its gradients are averaged there."""
    for parameter in model.vision.parameters() if model.vision is not None else ():
        parameter.requires_grad_(not frozen)
        parameter.average_gradients_across_tp_domain = average  # type: ignore[attr-defined]


def check_layout(family: Family, config: Config) -> dict[str, Any]:
    """Fields of megatron's config for the layers of each pipeline stage. Raises UserError for sizes that do not divide, shares that cannot be."""
    fields, wish = family.transformer(), config.parallel.stages
    config_checks.check_layout(config.parallel, heads=fields["num_attention_heads"], key_heads=fields["num_query_groups"], ffn=fields["ffn_hidden_size"],
                               layers=fields["num_layers"], deepstack=family.deepstack, family=family.name)
    if not wish or config.parallel.pipeline == 1:
        return {}
    layout = [["decoder"] * share for share in wish]
    return {"pipeline_model_parallel_layout": [["embedding", *layout[0]], *layout[1:-1], [*layout[-1], "loss"]]}
