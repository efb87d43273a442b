"""A thinking reward model scored in this process: a Hugging Face folder, no gradient, batched, images included.

`expected` (default): the mean of the distribution over the scores 0.0 ... 1.0 (trie.py), finer than any single reply and
without sampling noise. `parse`: a greedy reply, read by parse.py. With samples > 1 the scores are drawn from the same
distribution, each by its own seed.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sophiavl_fast import model_folder
from sophiavl_fast.compat.patch_embedding import use_products
from sophiavl_fast.config import Thinking
from sophiavl_fast.errors import UserError
from sophiavl_fast.rewards.thinking import Case, Verdict
from sophiavl_fast.rewards.thinking.parse import parse_score
from sophiavl_fast.rewards.thinking.prefix import PrefixModel, State
from sophiavl_fast.rewards.thinking.template import JudgeTemplate
from sophiavl_fast.rewards.thinking.trie import ScoreTrie, common_prefix, draw, expectation

TOKENS = 32_768        # padded tokens of one forward pass, prefixes counted for every row that reads them
REPLY_TOKENS = 48      # longest greedy reply
LEAST_MASS = 0.01      # a judge that gives all scores together less than this does not judge


@dataclass(slots=True)
class _Row:
    """One response to score: its case, its place there, its own tokens after the case's prefix."""

    case: int
    place: int
    tokens: list[int]
    seeds: Sequence[int]


@dataclass(slots=True)
class _Prompts:
    """Tokens of the cases of one batch: a prefix each (image tokens expanded), their vision inputs, and the rows."""

    prefixes: list[list[int]] = field(default_factory=list)
    rows: list[_Row] = field(default_factory=list)
    vision: dict[str, Tensor] = field(default_factory=dict)


class LocalJudge:
    """Scores cases in batches of whole groups. Raises UserError for a folder that holds no vision-language model."""

    def __init__(self, config: Thinking, template: JudgeTemplate, device: torch.device, *, least_mass: float = LEAST_MASS) -> None:
        if config.score == "parse" and config.samples > 1:
            raise UserError("thinking.samples > 1 with thinking.backend: local needs thinking.score: expected (a greedy reply has no variance)")
        self._config, self._template, self._least_mass = config, template, least_mass
        self._processor, model = _load(config.path, device)
        self._model = PrefixModel(model, self._processor, device)
        self._stop = _stop_ids(model, self._processor.tokenizer)
        self._trie = ScoreTrie(self._encode, template.reply)

    def submit(self, case: Case) -> Case:
        """Nothing begins early: whole batches are what makes this quick."""
        return case

    def close(self) -> None:
        """Nothing outlives the object."""

    @torch.inference_mode()
    def collect(self, tickets: Sequence[Case]) -> list[list[Verdict]]:
        """A verdict for each reasoning of each case, in order."""
        out = [[Verdict((math.nan,) * self._config.samples)] * len(case.reasonings) for case in tickets]
        busy = [i for i, case in enumerate(tickets) if case.reasonings]
        for batch in self._batches(tickets, busy):
            prompts = self._prepare([tickets[i] for i in batch])
            prefixes = self._model.prefill(prompts.prefixes, prompts.vision)
            for rows in _chunks(prompts):
                state = prefixes.select([r.case for r in rows])
                for row, verdict in zip(rows, self._score(state, rows), strict=True):
                    out[batch[row.case]][row.place] = verdict
        return out

    def _batches(self, cases: Sequence[Case], busy: list[int]) -> Iterator[list[int]]:
        """Runs of cases whose images and questions fit one forward pass, judged by pixels: a merged token sees 28 x 28 or more."""
        batch: list[int] = []
        size = 0
        for i in busy:
            cost = sum(image.width * image.height for image in cases[i].images) // 784 + len(cases[i].question) + 64
            if batch and size + cost > TOKENS:
                yield batch
                batch, size = [], 0
            batch.append(i)
            size += cost
        if batch:
            yield batch

    def _prepare(self, cases: Sequence[Case]) -> _Prompts:
        """Tokenise every row, find each case's longest common prefix, let the processor expand image tokens there."""
        texts = [[self._chat(case, place) for place in range(len(case.reasonings))] for case in cases]
        images = [image for case in cases for image in case.images]
        full = self._processor(text=[t[0] for t in texts], images=images or None, padding=False)
        vision = {k: torch.as_tensor(v) for k, v in full.items() if k in ("pixel_values", "image_grid_thw")}
        prompts = _Prompts(vision=vision)
        lead = self._trie.lead if self._config.score == "expected" else []
        for index, (case, mine) in enumerate(zip(cases, texts, strict=True)):
            plain = [self._encode(text) for text in mine]
            common = min(common_prefix(plain), min(map(len, plain)) - 1)
            expanded = list(full["input_ids"][index])
            prompts.prefixes.append(expanded[:len(expanded) - (len(plain[0]) - common)])
            prompts.rows += [_Row(index, place, ids[common:] + lead, case.seeds[place]) for place, ids in enumerate(plain)]
        return prompts

    def _chat(self, case: Case, place: int) -> str:
        text = self._template.user(case.question, case.reasonings[place], case.answers[place] if self._config.include_answer else "")
        messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image"}] * len(case.images) + [{"type": "text", "text": text}]}]
        if self._template.system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self._template.system}]})
        return self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _encode(self, text: str) -> list[int]:
        return self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _score(self, state: State, rows: list[_Row]) -> list[Verdict]:
        state, last = self._model.extend(state, [r.tokens for r in rows])
        if self._config.score == "parse":
            return [Verdict((found.value,), found.reason) for found in self._replies(state)]
        probabilities, mass = self._trie.distribution(last[:, -1], self._after_paths(state))
        means, known = expectation(probabilities).tolist(), mass.tolist()
        return [self._verdict(row, probabilities[i], means[i], known[i]) for i, row in enumerate(rows)]

    def _verdict(self, row: _Row, probabilities: Tensor, mean: float, mass: float) -> Verdict:
        count = self._config.samples
        if not mass >= self._least_mass:
            return Verdict((math.nan,) * count, f"judge gives all scores together probability {mass:.2g}: no model of the form '{self._template.reply}'")
        return Verdict((mean,) if count == 1 else tuple(draw(probabilities, row.seeds)))

    def _after_paths(self, state: State) -> Tensor | None:
        """Logits [B, paths, L, V] after each token of each path of the trie."""
        paths = self._trie.paths
        if not paths:
            return None
        count, width = len(state.mask), max(map(len, paths))
        repeated = state.select([row for row in range(count) for _ in paths])
        # short paths are filled up at the end: what stands after a path's last token is never read
        _, logits = self._model.extend(repeated, [list(p) + [p[-1]] * (width - len(p)) for _ in range(count) for p in paths], keep=width)
        return logits.view(count, len(paths), width, -1)

    def _replies(self, state: State) -> list[Any]:
        """Greedy replies, read."""
        replies: list[list[int]] = [[] for _ in range(len(state.mask))]
        done = [False] * len(replies)
        for _ in range(REPLY_TOKENS):
            picks = state.logits.argmax(-1).tolist()
            for i, token in enumerate(picks):
                done[i] = done[i] or token in self._stop
                if not done[i]:
                    replies[i].append(token)
            if all(done):
                break
            state, _ = self._model.extend(state, [[token] for token in picks])
        texts = [self._processor.tokenizer.decode(r, skip_special_tokens=True) for r in replies]
        return [parse_score(text, self._template.before, self._template.after) for text in texts]


def _chunks(prompts: _Prompts) -> Iterator[list[_Row]]:
    """Rows by length, so that padding is short, in runs whose tokens fit one forward pass."""
    prefix = max(map(len, prompts.prefixes))
    chunk: list[_Row] = []
    for row in sorted(prompts.rows, key=lambda r: len(r.tokens)):
        if chunk and (len(chunk) + 1) * (prefix + len(row.tokens)) > TOKENS:
            yield chunk
            chunk = []
        chunk.append(row)
    yield chunk


def _load(path: str, device: torch.device) -> tuple[Any, Any]:
    """Processor and frozen model of a folder, in the dtype it was saved in; local files only, none of its code is run."""
    model_folder.refuse_missing(path, "thinking.path")
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # also classes of transformers' and tokenizers' own
        raise UserError(f"thinking.path: '{path}' cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    model = model_folder.open_model(path, "thinking.path", dtype="auto")
    use_products(model)
    return processor, model.eval().requires_grad_(False).to(device)


def _stop_ids(model: Any, tokenizer: Any) -> set[int]:
    configured = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
