"""Groups -> packed rows: [prompt | response 1 | ... | response n] after each other, up to a token budget."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sophiavl_fast.errors import EngineError
from sophiavl_fast.types import Batch, Group, Prompt, Response


@dataclass(slots=True)
class Piece:
    """A prompt and the responses that are computed with it: a whole group, or one response of it under plain packing."""

    prompt: Prompt
    responses: list[Response]
    rows: list[int]          # index of each response in the step's flat list
    positions: Tensor        # [P, prompt tokens]
    after: int               # first position after the prompt

    @property
    def tokens(self) -> int:
        return len(self.prompt.expanded_ids) + sum(len(r.token_ids) for r in self.responses)


@dataclass(slots=True)
class Row:
    pieces: list[Piece] = field(default_factory=list)
    tokens: int = 0


def pack(groups: list[Group], advantages: Tensor | None, family: Any, *, share_prompt: bool, budget: int, multiple: int, check: bool = True) -> list[Batch]:
    """Rows of at most `budget` tokens (a longer piece gets a row of its own), each padded to a multiple of `multiple`.

    advantages [B] fp32 in the order of the groups' responses, or None for zeros. Batches lie on the CPU.
    Raises EngineError naming the prompt where image tokens and features, or tokens and log-probs, disagree.
    """
    rows = [Row()]
    for piece in _pieces(groups, family, share_prompt, check):
        if rows[-1].pieces and rows[-1].tokens + piece.tokens > budget:
            rows.append(Row())
        rows[-1].pieces.append(piece)
        rows[-1].tokens += piece.tokens
    return [_batch(row, advantages, multiple) for row in rows if row.pieces]


def _pieces(groups: list[Group], family: Any, share_prompt: bool, check: bool) -> Iterator[Piece]:
    flat = 0
    for group in groups:
        prompt = group.prompt
        if check:
            _check(group)
        positions, after = family.positions(torch.tensor(prompt.expanded_ids), prompt.image_grid_thw, f"prompt {prompt.id}")
        indices = list(range(flat, flat + len(group.responses)))
        flat += len(indices)
        shares = [(group.responses, indices)] if share_prompt else [([r], [i]) for r, i in zip(group.responses, indices)]
        for responses, members in shares:
            if responses:
                yield Piece(prompt, responses, members, positions, after)


def _check(group: Group) -> None:
    prompt = group.prompt
    pixels = 0 if prompt.pixel_values is None else len(prompt.pixel_values)
    patches = 0 if prompt.image_grid_thw is None else int(prompt.image_grid_thw.prod(-1).sum())
    if pixels != patches:
        raise EngineError(f"prompt {prompt.id}: {pixels} image patches, but its grid says {patches}")
    for i, response in enumerate(group.responses):
        sizes = len(response.token_ids), len(response.logprobs), len(response.weight_versions)
        if len(set(sizes)) > 1:
            raise EngineError(f"prompt {prompt.id}, response {i}: {sizes[0]} tokens, {sizes[1]} log-probs, {sizes[2]} weight versions")


def _batch(row: Row, advantages: Tensor | None, multiple: int) -> Batch:
    """One row's tensors. The prompt's last hidden row predicts every response's first token, each further token its successor."""
    tokens: list[int] = []
    positions: list[Tensor] = []
    group_start, group_of, response_start, lengths, predictor = [0], [], [], [], []
    for g, piece in enumerate(row.pieces):
        tokens += piece.prompt.expanded_ids
        positions.append(piece.positions)
        last = len(tokens) - 1
        for response in piece.responses:
            start, n = len(tokens), len(response.token_ids)
            group_of.append(g)
            response_start.append(start)
            lengths.append(n)
            predictor += [last, *range(start, start + n - 1)] if n else []
            tokens += response.token_ids
            positions.append(torch.arange(piece.after, piece.after + n).expand(len(piece.positions), n))
        group_start.append(len(tokens))
    pad = -len(tokens) % multiple
    positions.append(torch.zeros(len(positions[0]), pad, dtype=torch.int64))
    responses = [r for piece in row.pieces for r in piece.responses]
    row_of = torch.tensor([i for piece in row.pieces for i in piece.rows])
    images = [p.prompt for p in row.pieces if p.prompt.pixel_values is not None]
    return Batch(
        tokens=torch.tensor(tokens + [0] * pad), position_ids=torch.cat(positions, 1), group_start=torch.tensor(group_start),
        prompt_len=torch.tensor([len(p.prompt.expanded_ids) for p in row.pieces]), group_of=torch.tensor(group_of),
        response_start=torch.tensor(response_start), cu_seqlens=torch.tensor([0, *lengths]).cumsum(0), predictor=torch.tensor(predictor, dtype=torch.int64),
        target=torch.tensor([t for r in responses for t in r.token_ids], dtype=torch.int64),
        pixel_values=torch.cat([p.pixel_values for p in images]) if images else None,  # type: ignore[misc]
        image_grid_thw=torch.cat([p.image_grid_thw for p in images]) if images else None,  # type: ignore[misc]
        rollout_logprob=torch.tensor([x for r in responses for x in r.logprobs], dtype=torch.float32),
        weight_version=torch.tensor([v for r in responses for v in r.weight_versions], dtype=torch.int64),
        advantage=torch.zeros(len(row_of)) if advantages is None else advantages.float().cpu()[row_of], row_of=row_of,
    )
