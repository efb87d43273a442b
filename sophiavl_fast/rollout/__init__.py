"""Rollouts: Prompt -> Group, sampled by a real vLLM engine whose weights follow the policy's."""
from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable
from pathlib import Path

import torch

from sophiavl_fast.config import Config
from sophiavl_fast.errors import UserError
from sophiavl_fast.rollout.engine import Decode, RolloutEngine
from sophiavl_fast.rollout.environment import resolve_device
from sophiavl_fast.rollout.saved import Recorder, Replay, make_folder

__all__ = ["RolloutEngine", "open_rollout", "refuse_missing_engine"]


def open_rollout(config: Config, *, stop_ids: list[int], banned_ids: list[int], vocab_size: int, decode: Decode,
                 device: str | torch.device, run_dir: str | Path, replica: int = 0, replicas: int = 1,
                 on_wait: Callable[[float], None] | None = None) -> RolloutEngine:
    """Start (or reach) the engine of one data-parallel replica; blocks until it answers or `rollout.start_timeout_s` is out.

    stop_ids: every end-of-text id; banned_ids: never sampled; vocab_size: columns of the logits. decode: ids -> text.
    on_wait is called with the seconds waited so far while a server starts. Call it after the policy exists: an inline
    engine shares the policy's default process group. A spawned or inline engine starts with the weights of
    `model.path` as version 0; a server found running (`rollout.urls`) samples nothing before the first `send`.
    Raises UserError (no vLLM, port taken, bad ids), EngineError (did not start).
    """
    if config.debug.replay:
        return Replay(Path(config.debug.replay))
    _check_ids(stop_ids, banned_ids, vocab_size)
    if config.debug.record:
        make_folder(Path(config.debug.record))  # refused before an engine starts
    engine = _open_engine(config, stop_ids=stop_ids, banned_ids=banned_ids, decode=decode, device=device, run_dir=run_dir, replica=replica,
                          replicas=replicas, on_wait=on_wait)
    return Recorder(engine, Path(config.debug.record), replica, replicas) if config.debug.record else engine


def _open_engine(config: Config, *, stop_ids: list[int], banned_ids: list[int], decode: Decode, device: str | torch.device, run_dir: str | Path,
                 replica: int, replicas: int, on_wait: Callable[[float], None] | None) -> RolloutEngine:
    refuse_missing_engine(config)
    kind, nonce = resolve_device(device), secrets.token_hex(8)
    if config.rollout.engine == "inline":
        from sophiavl_fast.rollout.inline import InlineRollout

        return InlineRollout(config, stop_ids=stop_ids, banned_ids=banned_ids, decode=decode, device=kind, nonce=nonce)
    from sophiavl_fast.rollout.client import ServerRollout

    urls = config.rollout.urls[replica::replicas]
    if config.rollout.urls and not urls:
        raise UserError(f"rollout.urls names {len(config.rollout.urls)} servers for {replicas} data-parallel replicas; each replica needs its own")
    return ServerRollout(config, urls=urls, stop_ids=stop_ids, banned_ids=banned_ids, decode=decode, device=kind, nonce=nonce,
                         run_dir=run_dir, on_wait=on_wait, replica=replica)


def refuse_missing_engine(config: Config) -> None:
    """UserError where vLLM is not installed."""
    if not _installed("vllm"):
        raise UserError(f"rollout.engine: {config.rollout.engine} needs vLLM, which is not installed; run `make install` (extra `cpu` or `gpu`)")


def _check_ids(stop_ids: list[int], banned_ids: list[int], vocab_size: int) -> None:
    outside = [i for i in (*stop_ids, *banned_ids) if not 0 <= i < vocab_size]
    if outside:
        raise UserError(f"token id {outside[0]} lies outside the model's vocabulary of {vocab_size}")
    if not stop_ids:
        raise UserError("no end-of-text token: the tokenizer and generation config of model.path name none")
    if both := sorted(set(stop_ids) & set(banned_ids)):
        raise UserError(f"token id {both[0]} is both an end-of-text token and banned")
    if len(set(banned_ids)) >= vocab_size:
        raise UserError("every token of the vocabulary is banned")


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False
