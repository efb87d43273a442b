"""What both engines share: the interface, the seeds, the checks, and Groups from raw samples."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sophiavl_fast.errors import EngineError, UserError
from sophiavl_fast.rollout.arguments import MAX_IMAGES
from sophiavl_fast.types import Group, Prompt, Response, WeightSource, derive_seed

Decode = Callable[[list[int]], str]
OnProgress = Callable[[int, int, int], None]   # responses done, responses wanted, tokens so far
OnGroup = Callable[[Group], None]              # each group as soon as its last response is in


class RolloutEngine(Protocol):
    """A vLLM engine that samples groups and takes new weights in place."""

    version: int
    """Version of the weights it samples with; 0 until the first `send`."""

    def generate(self, prompts: list[Prompt], *, n: int, step: int, seed: int, temperature: float, max_new_tokens: int,
                 on_group: OnGroup | None = None, on_progress: OnProgress | None = None) -> list[Group]:
        """n responses to each prompt, in the prompts' order; temperature 0 is greedy decoding. Response i of a prompt is drawn
        with seed derive_seed(seed, step, prompt.id) + i: order and batch size change nothing. `on_group` lets scoring overlap.
        Raises UserError for a prompt that cannot fit, EngineError naming engine and prompt for all else."""
        ...

    def send(self, source: WeightSource, version: int) -> dict[str, float]:
        """Replace every weight in place and forget what was cached under the old ones. Every model-parallel peer of the
        caller iterates `source.weights()` once meanwhile, since gathering is a collective. Yielded tensors must not be written to
        before this returns. Returns seconds by phase (`gather_s`, `convert_s`, `send_s`, `load_s`, `reset_s`) and `bytes`.
        A source with `frozen` names and `weights(trained_only=True)` sends those names once only. It is kept, and gone through
        again where an engine was started anew. Raises EngineError when a name is missing or unknown or no engine is left;
        the engine is unusable then."""
        ...

    def sleep(self) -> None:
        """With `rollout.sleep`: leave the GPU's memory to the trainer. The next `send` wakes it, or the next `generate`, with the weights it has.
        Not while `generate` runs. Raises EngineError when no engine is left."""
        ...

    def tend(self) -> None:
        """Give engines that were started anew the current weights, in the thread and at a time at which the source's are those last sent."""
        ...

    def counters(self) -> dict[str, float]:
        """Since the last call: `restarts` of engines, requests `redone`; empty where neither can be."""
        ...

    def close(self) -> None:
        """End the engine and everything it started; calling it twice is harmless."""
        ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """One call's sampling settings."""

    n: int
    step: int
    seed: int
    temperature: float
    max_new_tokens: int

    def seed_of(self, prompt: Prompt) -> int:
        """Seed of a prompt's first response; vLLM gives response i of a request this seed plus i."""
        return derive_seed(self.seed, self.step, prompt.id)

    def arguments(self, prompt: Prompt, stop_ids: list[int]) -> dict:
        """Keyword arguments of vLLM's SamplingParams, and the `sampling_params` of its HTTP interface.

        Full support: no top-p, top-k, penalties or minimum length. The stop ids are exactly ours (`ignore_eos` keeps
        the tokenizer's and the generation config's out), so that the trainer knows which tokens end a response.
        """
        return {"n": self.n, "temperature": self.temperature, "top_p": 1.0, "top_k": 0, "seed": self.seed_of(prompt), "ignore_eos": True,
                "max_tokens": self.max_new_tokens, "stop_token_ids": stop_ids, "logprobs": 0, "detokenize": False}


@dataclass(slots=True)
class Sample:
    """One raw answer: ids, log-probs of the sampling distribution, why it ended, weight version of each token."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    weight_versions: list[int]


def check_fits(prompts: list[Prompt], max_new_tokens: int, limit: int) -> None:
    """Refuse prompts that the engine would have to cut, or that hold more images than it was started for."""
    for prompt in prompts:
        if len(prompt.expanded_ids) + max_new_tokens > limit:
            raise UserError(f"prompt '{prompt.id}': {len(prompt.expanded_ids)} tokens + {max_new_tokens} new ones exceed the engine's {limit}; "
                            "lower data.max_prompt_tokens or rollout.max_new_tokens, or raise rollout.max_model_len")
        if len(prompt.images) > MAX_IMAGES:
            raise UserError(f"prompt '{prompt.id}' has {len(prompt.images)} images; the engine takes at most {MAX_IMAGES}")


def check_prompt_ids(prompt: Prompt, engine_ids: list[int]) -> None:
    """The engine's own prompt must be the one that the trainer computes: same ids, same image tokens."""
    if list(engine_ids) != prompt.expanded_ids:
        at = next((i for i, (a, b) in enumerate(zip(engine_ids, prompt.expanded_ids)) if a != b), min(len(engine_ids), len(prompt.expanded_ids)))
        raise EngineError(f"rollout: the engine sees another prompt '{prompt.id}' than the trainer: {len(engine_ids)} against "
                          f"{len(prompt.expanded_ids)} tokens, first difference at {at} (image size limits differ, or the prompt was expanded twice)")


class Collected:
    """Turns raw samples into groups as they arrive, in any order, and tells who wants to know."""

    def __init__(self, prompts: list[Prompt], sampling: Sampling, decode: Decode, on_group: OnGroup | None, on_progress: OnProgress | None) -> None:
        self._prompts, self._sampling, self._decode = prompts, sampling, decode
        self._on_group, self._on_progress = on_group, on_progress
        self._groups: dict[int, Group] = {}
        self._tokens = 0

    def add(self, number: int, samples: list[Sample]) -> None:
        """All samples of prompt `number`. Raises EngineError for an answer that is no finished sample."""
        prompt, wanted = self._prompts[number], self._sampling.n
        if len(samples) != wanted:
            raise EngineError(f"rollout: {len(samples)} responses to prompt '{prompt.id}' instead of {wanted}")
        group = Group(prompt=prompt, responses=[self._response(prompt, i, s) for i, s in enumerate(samples)], step=self._sampling.step)
        self._groups[number] = group
        self._tokens += sum(len(s.token_ids) for s in samples)
        if self._on_group:
            self._on_group(group)
        if self._on_progress:
            self._on_progress(len(self._groups) * wanted, len(self._prompts) * wanted, self._tokens)

    def groups(self) -> list[Group]:
        """In the prompts' order."""
        return [self._groups[i] for i in range(len(self._prompts))]

    def _response(self, prompt: Prompt, i: int, sample: Sample) -> Response:
        tokens = len(sample.token_ids)
        if sample.finish_reason not in ("stop", "length") or not tokens:
            raise EngineError(f"rollout: response {i} of prompt '{prompt.id}' ended with '{sample.finish_reason}' after {tokens} tokens")
        if not tokens == len(sample.logprobs) == len(sample.weight_versions):
            raise EngineError(f"rollout: response {i} of prompt '{prompt.id}' has {tokens} tokens, {len(sample.logprobs)} log-probs "
                              f"and {len(sample.weight_versions)} weight versions")
        return Response(token_ids=sample.token_ids, logprobs=sample.logprobs, text=self._decode(sample.token_ids),
                        finish_reason=sample.finish_reason, seed=self._sampling.seed_of(prompt) + i, weight_versions=sample.weight_versions)
