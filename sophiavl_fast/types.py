"""All that passes between rooms: Prompt -> Group -> Scores -> Batch, and the small protocols.

Shapes by letters: B responses, G groups, T response tokens, S packed tokens, V vocabulary, I images,
N image patches. Log-probs, advantages and losses are fp32; ids and positions are int64.
"""
from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

MAX_IMAGES = 16
"""Images of a prompt, at most: rollout engines and served judges are started for so many."""


def derive_seed(run_seed: int, *parts: Any) -> int:
    """A 31-bit seed from (run seed, step, prompt id, i, ...): the same for any order, batch size or restart."""
    text = "\x1f".join(str(p) for p in (run_seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") & 0x7FFFFFFF


@dataclass(slots=True, kw_only=True)
class Prompt:
    """One record, ready for both engines.

    `token_ids` holds ONE placeholder an image: that is what vLLM gets (it expands placeholders itself, and would
    expand already expanded ones again). `expanded_ids` holds one image token a feature: what the policy computes,
    and what vLLM must report back as its own prompt ids.
    """

    id: str                              # "dataset:problem_id", unique in a run
    dataset: str
    problem_type: str                    # numerical | multiple_choice | ocr | free_form | text
    question: str                        # the user's question, options included, before the prompt template
    gold: str                            # the answer, unwrapped from <answer>..</answer>
    options: list[str] = field(default_factory=list)
    process: str = ""                    # a reference reasoning trace, "" if the record has none
    text: str = ""                       # the chat-templated text with one placeholder an image
    token_ids: list[int] = field(default_factory=list)
    expanded_ids: list[int] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)        # PIL.Image, RGB, resized as the processor wants them
    image_paths: list[str] = field(default_factory=list)   # absolute; "" for images given as bytes
    pixel_values: Tensor | None = None   # [N, C*T*P*P] fp32, None without images
    image_grid_thw: Tensor | None = None  # [I, 3] int64, patches a side before merging
    record: dict[str, Any] = field(default_factory=dict)   # the record as read


@dataclass(slots=True, kw_only=True)
class Response:
    """One sampled answer: exactly the tokens that vLLM sampled, never re-tokenised text."""

    token_ids: list[int]                 # end-of-text included when it was sampled, absent when truncated
    logprobs: list[float]                # of the sampling distribution (temperature and bans applied)
    text: str                            # decoded, special tokens dropped
    finish_reason: str                   # "stop" | "length"
    seed: int
    weight_versions: list[int]           # one a token


@dataclass(slots=True, kw_only=True)
class Group:
    """The n responses of one prompt: the unit of work."""

    prompt: Prompt
    responses: list[Response]
    step: int = 0


@dataclass(slots=True, kw_only=True)
class Scores:
    """What the rewards room says of a list of groups; rows in the order of the groups' responses.

    outcome [B] fp32 in the task's own range; format_ok [B] bool; thinking [B] or [B, K] fp32, NaN: not scored,
    None: the thinking reward is off; reasons: one line for every NaN or killed grader, keyed by row; killed: outcomes
    that are 0 because their grader hung, crashed or ran out of memory (metric reward/grader_killed). overlong [B] fp32 in [-1, 0]: the
    length penalty that is added to the outcome but says nothing of its correctness; None: there is none.
    """

    outcome: Tensor
    format_ok: Tensor
    thinking: Tensor | None = None
    reasons: dict[int, str] = field(default_factory=dict)
    killed: int = 0
    overlong: Tensor | None = None
    seconds: float = 0.0


@dataclass(slots=True, kw_only=True)
class Batch:
    """One packed row: a list of groups, each [prompt | response 1 | ... | response n], as plain tensors.

    A response attends to its prompt and to itself; its position ids go on from the prompt's end. Plain packing
    (policy.share_prompt: false) is the same layout with one response a group. Rows R of `token_of` index S.

    tokens          [S]    int64   packed ids, image tokens expanded; padding (tp multiple) at the end
    position_ids    [P, S] int64   P = 3 for mrope (t, h, w), 1 for plain rope
    group_start     [G+1]  int64   first token of each group; the last entry is the end of the last group (<= S)
    prompt_len      [G]    int64   prompt tokens of each group
    group_of        [B]    int64   group of each response, ascending
    response_start  [B]    int64   first packed token of each response
    cu_seqlens      [B+1]  int64   response boundaries in the T axis
    predictor       [T]    int64   packed row whose hidden state predicts target t (a prompt's last row predicts n first tokens)
    target          [T]    int64   the response tokens
    pixel_values    [N, C] fp32 or None;  image_grid_thw [I, 3] int64 or None
    rollout_logprob [T]    fp32    what the engine said;  weight_version [T] int64
    advantage       [B]    fp32
    old_logprob, ref_logprob [T] fp32 or None: filled by the policy before the update
    row_of          [B]    int64   index of each response in the step's flat list (groups in order)
    """

    tokens: Tensor
    position_ids: Tensor
    group_start: Tensor
    prompt_len: Tensor
    group_of: Tensor
    response_start: Tensor
    cu_seqlens: Tensor
    predictor: Tensor
    target: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    rollout_logprob: Tensor
    weight_version: Tensor
    advantage: Tensor
    row_of: Tensor
    old_logprob: Tensor | None = None
    ref_logprob: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same row on another device."""
        moved: dict[str, Any] = {f.name: v.to(device) if isinstance(v := getattr(self, f.name), Tensor) else v for f in fields(self)}
        return Batch(**moved)

    def save(self, path: str | Path) -> None:
        """Write as safetensors (no pickle); absent tensors are left out."""
        from safetensors.torch import save_file

        save_file({f.name: v.contiguous() for f in fields(self) if (v := getattr(self, f.name)) is not None}, str(path))

    @classmethod
    def load(cls, path: str | Path) -> Batch:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        found = load_file(str(path))
        tensors: dict[str, Any] = {f.name: found.get(f.name) for f in fields(cls)}
        return cls(**tensors)


class Scorer(Protocol):
    """Scores the responses of groups: [B] or [B, K] fp32, NaN where no score could be had."""

    def score(self, groups: list[Group]) -> Tensor: ...


class WeightSource(Protocol):
    """Yields (Hugging Face name, full tensor), one at a time, in a fixed order; every rank must iterate it."""

    def weights(self) -> Iterator[tuple[str, Tensor]]: ...
