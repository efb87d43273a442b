"""The same answers by plain `transformers`: the oracle that an export is what the trainer trained."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sophiavl_fast import model_folder
from sophiavl_fast.config import Config
from sophiavl_fast.data.processor import Processor
from sophiavl_fast.types import Group, Prompt, Response

ROWS = 64  # prompts answered at once


def load(path: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a local folder, in evaluation mode. Raises UserError, as model_folder.open_model does."""
    return model_folder.open_model(path, dtype=dtype, attn_implementation="sdpa").to(device).eval()


def answer(config: Config, processor: Processor, prompts: list[Prompt]) -> list[Group]:
    """One greedy response a prompt, with the trainer's stop ids and banned ids."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load(config.model.path, getattr(torch, config.model.dtype), device)
    groups: list[Group] = []
    for rows in _chunks(sorted(prompts, key=lambda p: len(p.expanded_ids)), ROWS):
        groups += [_group(p, ids, processor) for p, ids in zip(rows, generate(model, processor, rows, config.rollout.max_new_tokens), strict=True)]
    order = {p.id: i for i, p in enumerate(prompts)}
    return sorted(groups, key=lambda g: order[g.prompt.id])


@torch.inference_mode()
def generate(model: Any, processor: Processor, prompts: list[Prompt], max_new_tokens: int) -> list[list[int]]:
    """Greedy token ids of each prompt, end-of-text included when it came; left-padded, one forward for all."""
    from sophiavl_fast.policy.families import open_family

    width = max(len(p.expanded_ids) for p in prompts)
    pad = processor.stop_ids[0]
    ids = torch.tensor([[pad] * (width - len(p.expanded_ids)) + p.expanded_ids for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p.expanded_ids)) + [1] * len(p.expanded_ids) for p in prompts], device=model.device)
    seen = [p for p in prompts if p.pixel_values is not None]
    images = {} if not seen else open_family(processor.path).hf_inputs(
        ids, torch.cat([p.pixel_values for p in seen if p.pixel_values is not None]).to(model.device, model.dtype),
        torch.cat([p.image_grid_thw for p in seen if p.image_grid_thw is not None]).to(model.device))
    out = model.generate(input_ids=ids, attention_mask=mask, **images, max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.0,
                         temperature=None, top_p=None, top_k=None, suppress_tokens=processor.banned_ids or None,
                         eos_token_id=processor.stop_ids, pad_token_id=pad)[:, width:].tolist()
    return [_until_stop(row, processor.stop_ids) for row in out]


def _until_stop(ids: list[int], stop: list[int]) -> list[int]:
    ends = [i for i, token in enumerate(ids) if token in stop]
    return ids[:ends[0] + 1] if ends else ids


def _group(prompt: Prompt, ids: list[int], processor: Processor) -> Group:
    finish = "stop" if ids and ids[-1] in processor.stop_ids else "length"
    return Group(prompt=prompt, responses=[Response(token_ids=ids, logprobs=[], text=processor.decode(ids), finish_reason=finish, seed=0, weight_versions=[])])


def _chunks(rows: list, size: int) -> Iterator[list]:
    for first in range(0, len(rows), size):
        yield rows[first:first + size]
