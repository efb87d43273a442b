"""The engine inside the trainer's own process: starts in ten seconds, no hop; one process, tests, laptops, one GPU.

vLLM treats a process as its own, so this file hands back what it takes: torch's random state (the engine seeds it and
draws from it), torch.set_num_threads and the thread count, the default dtype, and the default process group, which the
policy has initialised (a world of one) and vLLM's own shutdown would destroy.
"""
from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from sophiavl_fast.config import Config
from sophiavl_fast.errors import EngineError, UserError
from sophiavl_fast.rollout.arguments import engine_arguments, max_model_len
from sophiavl_fast.rollout.engine import (
    Collected,
    Decode,
    OnGroup,
    OnProgress,
    Sample,
    Sampling,
    check_fits,
    check_prompt_ids,
)
from sophiavl_fast.rollout.environment import inline_environment
from sophiavl_fast.rollout.transfer import Lane, Transfer
from sophiavl_fast.rollout.transfer.control import Part
from sophiavl_fast.rollout.transfer.inproc import InprocChannel
from sophiavl_fast.types import Group, Prompt, WeightSource


class InlineRollout:
    """RolloutEngine in this process. nonce: this run's; decode: ids -> text without special tokens."""

    def __init__(self, config: Config, *, stop_ids: list[int], banned_ids: list[int], decode: Decode, device: str, nonce: str) -> None:
        self.version, self._sleeps = 0, config.rollout.sleep
        self._stop_ids, self._decode, self._limit = stop_ids, decode, max_model_len(config)
        self._own_group = not dist.is_initialized()
        with inline_environment(device), kept_globals():
            self._engine: Any = _start(engine_arguments(config, device, "inproc") | {"distributed_executor_backend": "uni"})
        control = InlineControl(self._engine)
        control.rpc("sophia_claim", nonce, banned_ids)
        self._lane = Lane(control, InprocChannel(control))
        self._transfer = Transfer(nonce=nonce, checksums=config.rollout.checksum, overlap=False)

    def generate(self, prompts: list[Prompt], *, n: int, step: int, seed: int, temperature: float, max_new_tokens: int,
                 on_group: OnGroup | None = None, on_progress: OnProgress | None = None) -> list[Group]:
        self._transfer.refuse_broken()
        check_fits(prompts, max_new_tokens, self._limit)
        sampling = Sampling(n, step, seed, temperature, max_new_tokens)
        collected = Collected(prompts, sampling, self._decode, on_group, on_progress)
        with kept_globals():
            self._lane.wake()
            rendered = [self._render(prompt) for prompt in prompts]   # all checked before the first is queued
            try:
                for number, prompt in enumerate(prompts):
                    self._queue(number, prompt, rendered[number], sampling)
                for number, samples in self._finished():
                    collected.add(number, samples)
            except BaseException:
                self._engine.abort_request([str(i) for i in range(len(prompts))])   # or they would answer the next call
                raise
        return collected.groups()

    def send(self, source: WeightSource, version: int) -> dict[str, float]:
        with kept_globals():
            times, _ = self._transfer.send([self._lane], source, version)
        self.version = version
        return times

    def counters(self) -> dict[str, float]:
        return {}

    def sleep(self) -> None:
        if self._sleeps:
            with kept_globals():
                self._lane.sleep()

    def tend(self) -> None:
        pass

    def close(self) -> None:
        if self._engine is None:
            return
        self._transfer.close()
        with kept_globals():
            _shut_down(self._engine, self._own_group)
        self._engine = None

    def _render(self, prompt: Prompt) -> Any:
        """vLLM's processed input; it is shared by the n samples, so images are processed once a prompt."""
        from vllm.inputs import TokensPrompt

        given = TokensPrompt(prompt_token_ids=prompt.token_ids)
        if prompt.images:
            given["multi_modal_data"] = {"image": prompt.images}
        [rendered] = self._engine.renderer.render_cmpl([given])
        check_prompt_ids(prompt, rendered["prompt_token_ids"])
        return rendered

    def _queue(self, number: int, prompt: Prompt, rendered: Any, sampling: Sampling) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(**sampling.arguments(prompt, self._stop_ids), flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY)
        self._engine.add_request(str(number), rendered, params)

    def _finished(self) -> Iterator[tuple[int, list[Sample]]]:
        """Run the engine until nothing is left; yields each prompt's number and samples when its last response ends."""
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                yield int(output.request_id), [
                    Sample(token_ids=list(a.token_ids), logprobs=list(a.logprobs.logprobs), finish_reason=a.finish_reason,
                           weight_versions=[self.version] * len(a.token_ids))
                    for a in sorted(output.outputs, key=lambda a: a.index)]


class InlineControl:
    """Control plane of an engine in this process: plain calls, no deadline to miss."""

    name = "the inline engine"

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return self._try(method, lambda: self._engine.collective_rpc(method, args=args, kwargs=kwargs))

    def init_transfer(self, info: dict[str, Any]) -> None:
        self.rpc("init_weight_transfer_engine", init_info=info)

    def start(self) -> None:
        self.rpc("start_weight_update")

    def update(self, info: dict[str, Any]) -> None:
        self.rpc("update_weights", update_info=info)

    def finish(self, label: str) -> None:
        self.rpc("finish_weight_update")
        self._engine.set_weight_version(label)

    def reset_caches(self, *, in_flight: bool) -> None:
        if not self._engine.reset_prefix_cache():
            raise EngineError(f"{self.name}: the prefix cache could not be reset, requests are still in flight")
        self._engine.reset_mm_cache()
        self._engine.reset_encoder_cache()

    def pause(self, *, keep: bool) -> None:
        if self._engine.has_unfinished_requests():
            raise EngineError(f"{self.name}: requests are still in flight")

    def resume(self) -> None:
        pass

    def sleep(self) -> None:
        self._try("sleep", lambda: self._engine.sleep(1))

    def wake(self, part: Part) -> None:
        self._try(f"waking ({part})", lambda: self._engine.wake_up([part]))
        if part == "kv_cache" and self._engine.is_sleeping():
            raise EngineError(f"{self.name} still sleeps after it was woken")

    def workers(self) -> int:
        return 1

    def diagnosis(self) -> str:
        return ""

    def _try(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            raise EngineError(f"{self.name}: {what} failed: {error}") from error


@contextmanager
def kept_globals() -> Iterator[None]:
    """Leave torch's random state, thread count and default dtype as they were."""
    set_threads, threads, dtype = torch.set_num_threads, torch.get_num_threads(), torch.get_default_dtype()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            torch.set_num_threads = set_threads   # vLLM's CPU worker replaces it by a warning
            if torch.get_num_threads() != threads:
                set_threads(threads)
            torch.set_default_dtype(dtype)


def _start(arguments: dict[str, Any]) -> Any:
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
    except ImportError as error:
        raise UserError(f"rollout.engine: inline needs vLLM, which does not import here ({error}); run `make install`") from None

    import sophiavl_fast.rollout.worker  # noqa: F401  (registers the inproc backend before vLLM looks for it)

    try:
        return LLMEngine.from_engine_args(EngineArgs(**arguments, disable_log_stats=True, use_tqdm_on_load=False))
    except Exception as error:
        raise EngineError(f"the inline engine did not start: {' '.join(str(error).split())}") from error


def _shut_down(engine: Any, own_group: bool) -> None:
    """vLLM's own shutdown, less the end of the default process group where that is the trainer's."""
    client = engine.engine_core
    if own_group:
        client._finalizer()
        return
    from vllm.distributed import parallel_state

    client._finalizer.detach()                 # it would run when the engine is collected, and end the group then
    client.engine_core.model_executor.shutdown()
    client.engine_core.scheduler.shutdown()
    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:      # vLLM's handle of the default group, not the group itself
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None
    gc.unfreeze()                              # the engine froze all objects at its start
