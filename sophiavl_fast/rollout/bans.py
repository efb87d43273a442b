"""Tokens that are never sampled: -inf in their logits, before temperature and log-probs are taken.

A logit bias would do it only nearly (it is clamped to +-100, and divided by the temperature) and costs a Python list a
request at each change of the batch. Bans are the same for the whole run, so one column fill a step is enough: the run
hands its list to the engine's workers once (`worker.EngineExtension.sophia_claim`), in whichever process they live.
vLLM has two model runners with two processor interfaces; `CLASS` names the one for each.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as ProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as ProcessorV2

if TYPE_CHECKING:
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

_banned = torch.empty(0, dtype=torch.long)


def set_banned(ids: list[int]) -> None:
    """Replace this process's list of banned token ids."""
    global _banned
    _banned = torch.tensor(ids, dtype=torch.long)


def apply_bans(logits: Tensor) -> Tensor:
    """Fill the banned columns of logits [rows, V] with -inf, in place."""
    global _banned
    if _banned.device != logits.device:
        _banned = _banned.to(logits.device)
    return logits.index_fill_(1, _banned, -torch.inf)


class BansV1(ProcessorV1):
    """For vLLM's first model runner (the only one on a CPU)."""

    def __init__(self, vllm_config, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def apply(self, logits: Tensor) -> Tensor:
        return apply_bans(logits)

    def is_argmax_invariant(self) -> bool:
        return False  # greedy decoding obeys the bans too

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        pass


class BansV2(ProcessorV2):
    """For vLLM's second model runner."""

    def apply(self, logits: Tensor, ctx) -> Tensor:
        return apply_bans(logits)
