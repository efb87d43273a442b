"""The range of every number of a configuration. What has none here may be any finite number."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from sophiavl_fast.errors import UserError

RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "at least 1": (lambda x: x >= 1, """
        run.steps model.min_pixels model.max_pixels data.max_prompt_tokens data.workers rollout.n rollout.prompts_per_step rollout.max_new_tokens
        rollout.engines rollout.max_num_seqs rollout.max_model_len rollout.tensor_parallel parallel.tensor parallel.pipeline parallel.context parallel.data
        algorithm.mini_batches algorithm.epochs policy.tokens_per_row policy.logprob_chunk sft.batch_size thinking.samples thinking.concurrency
        debug.compare_every rewards.workers rewards.memory_mb eval.limit eval.max_new_tokens checkpoint.keep"""),
    "at least 0": (lambda x: x >= 0, """
        rollout.staleness rollout.resample rollout.max_restarts algorithm.kl_coef algorithm.clip_low algorithm.clip_high algorithm.entropy_coef thinking.retries
        rewards.numeric_tolerance optim.weight_decay optim.clip_grad optim.warmup_steps optim.min_lr eval.every
        checkpoint.every trust.alpha"""),
    "greater than 0": (lambda x: x > 0, """
        rollout.start_timeout_s rollout.request_timeout_s rollout.transfer_timeout_s rollout.max_logprob_diff optim.lr optim.eps
        trust.anneal_steps thinking.timeout_s thinking.batch_timeout_s rewards.timeout_s policy.control_timeout_s algorithm.pre_clip algorithm.tis_cap
        algorithm.sigma_filter"""),
    # vLLM samples no colder than 0.01, whatever it is asked for; 0 is greedy decoding
    "at least 0.01": (lambda x: x >= 0.01, "rollout.temperature"),
    "0 or at least 0.01": (lambda x: x == 0 or x >= 0.01, "eval.temperature"),
    "greater than 1": (lambda x: x > 1, "algorithm.dual_clip algorithm.mismatch_cap"),
    "in (0, 1]": (lambda x: 0 < x <= 1, "thinking.quorum thinking.gpu_memory memory.fraction rollout.gpu_memory_utilization"),
    "in [0, 1)": (lambda x: 0 <= x < 1, "optim.beta1 optim.beta2"),
    "in [0, 65535]": (lambda x: 0 <= x <= 65535, "rollout.port"),
    "in [0, 2^32)": (lambda x: 0 <= x < 2**32, "run.seed"),
}


def check(tree: dict[str, Any]) -> None:
    """Raises UserError for the first number of the dumped tree that is not finite or lies outside its range; null is always inside."""
    numbers = dict(_numbers(tree, ""))
    for key, value in numbers.items():
        if not math.isfinite(value):
            raise UserError(f"{key} = {value}: must be a finite number")
    for words, (inside, keys) in RANGES.items():
        for key in keys.split():
            if key in numbers and not inside(numbers[key]):
                raise UserError(f"{key} = {numbers[key]}: must {'lie' if words.startswith('in ') else 'be'} {words}")


def _numbers(tree: dict[Any, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
