"""Seeded sampling on vLLM's CPU engine where the prompts of a step do not fit into one engine step (max_num_batched_tokens).

A prompt that is only partly read still has a token sampled, which is thrown away together with the draw behind it: vLLM moves the request's
generator back by its offset. Only CUDA's generators have one; on a CPU the engine dies of it. Here the state itself is put back.
"""
from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from typing import Any

import numpy as np


def install() -> None:
    """In a worker's process, before it samples; does nothing where the engine is not on a CPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    runner: Any = CPUModelRunner
    if not hasattr(runner, "sophia_rewinds"):
        runner.sophia_rewinds = True
        runner._sample = _restoring(runner._sample)
        runner._bookkeeping_sync = _without_offsets(runner._bookkeeping_sync)


def _restoring(sample: Any) -> Any:
    @wraps(sample)
    def wrapped(runner: Any, *arguments: Any, **named: Any) -> Any:
        before = [(generator, generator.get_state()) for _, generator in _unread(runner)]
        output = sample(runner, *arguments, **named)
        for generator, state in before:
            generator.set_state(state)
        return output

    return wrapped


def _without_offsets(bookkeeping: Any) -> Any:
    @wraps(bookkeeping)
    def wrapped(runner: Any, *arguments: Any, **named: Any) -> Any:
        generators, aside = runner.input_batch.generators, dict(_unread(runner))
        for row in aside:
            del generators[row]
        try:
            return bookkeeping(runner, *arguments, **named)
        finally:
            generators.update(aside)

    return wrapped


def _unread(runner: Any) -> Iterator[tuple[int, Any]]:
    """Row and generator of each seeded request whose prompt this engine step does not finish."""
    batch = runner.input_batch
    for row in np.nonzero(runner.discard_request_mask.np[:batch.num_reqs])[0].tolist():
        if (generator := batch.generators.get(row)) is not None:
            yield row, generator
