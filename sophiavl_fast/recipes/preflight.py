"""What a run must find before it loads any weight: its engine, its port, its loggers, its judge's endpoint, and records it can use to the end."""
from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from sophiavl_fast import config_checks, model_folder
from sophiavl_fast.config import Config
from sophiavl_fast.data.limits import Limits
from sophiavl_fast.errors import UserError
from sophiavl_fast.evaluate.records import refuse_unusable
from sophiavl_fast.monitor.checks import Row
from sophiavl_fast.monitor.loggers import refuse_missing_loggers
from sophiavl_fast.rewards.thinking import open_judge
from sophiavl_fast.rewards.thinking.endpoint import EndpointJudge
from sophiavl_fast.rollout import identity, refuse_missing_engine
from sophiavl_fast.rollout.arguments import max_model_len
from sophiavl_fast.rollout.machine import refuse_foreign
from sophiavl_fast.rollout.server import CLOSE_S, pick_port
from sophiavl_fast.types import MAX_IMAGES

UNSCORED = "thinking.on_error = drop: until it answers no response has a thinking score, which leaves plain GRPO"


def refuse_absent(config: Config) -> None:
    """UserError for a logger or vLLM that is not installed, a port that is taken, an endpoint that does not answer (with thinking.on_error: drop a warning).

    The first rank asks, once: at most one short request, and imports that come later anyway.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    refuse_missing_loggers(config)
    if config.recipe != "rl":
        return
    if not config.debug.replay:
        refuse_missing_engine(config)
        _refuse_taken_ports(config)
    if config.thinking.backend == "endpoint" and not config.thinking.serve:
        _ask_judge(config)


def _ask_judge(config: Config) -> None:
    """Whether the endpoint answers and serves the model: with thinking.on_error: fail a UserError where it does not, with drop a warning."""
    if silent := _silent_judge(config):
        if config.thinking.on_error == "fail":
            raise silent
        print(f"sophiavl-fast: {silent}; the run goes on ({UNSCORED})", file=sys.stderr, flush=True)


def judge_rows(config: Config) -> list[Row]:
    """The doctor's row for a thinking reward model that is asked by URL."""
    thinking = config.thinking
    if config.recipe != "rl" or config.algorithm.name == "grpo" or thinking.backend != "endpoint" or thinking.serve:
        return []
    try:
        silent = _silent_judge(config)
    except UserError as error:           # its template or URL
        return [Row("judge", "FAIL", str(error))]
    if not silent:
        return [Row("judge", "OK", f"'{thinking.model}' at {thinking.url}")]
    strict = thinking.on_error == "fail"
    return [Row("judge", "FAIL" if strict else "WARN", str(silent), f"start it, or set thinking.url{'' if strict else f'; {UNSCORED}'}")]


def _silent_judge(config: Config) -> UserError | None:
    """Why the endpoint cannot be asked now, if it cannot. Raises UserError for what no endpoint could mend."""
    lenient = config.model_copy(update={"thinking": config.thinking.model_copy(update={"on_error": "drop"})})      # which opens without asking
    judge = open_judge(lenient, torch.device("cpu"))
    if not isinstance(judge, EndpointJudge):
        return None
    try:
        judge.probe()
    except UserError as error:
        return error
    finally:
        judge.close()
    return None


def refuse_other_models(config: Config) -> None:
    """UserError for a server of rollout.urls that answers and holds another model, or that no weights could reach.

    Each lead asks its own servers: an address may be another one elsewhere.
    """
    if config.rollout.engine == "server" and not config.debug.replay:
        urls = own_urls(config)
        if urls and config.rollout.transfer_host:
            refuse_foreign(config.rollout.transfer_host)
        identity.refuse_others(config, urls)


def own_urls(config: Config) -> list[str]:
    """The servers of the replica that this rank leads, before any process group tells; none for a lead's peers. Ranks: see policy.distributed._peers."""
    p, rank, world = config.parallel, int(os.environ.get("RANK", "0")), config_checks.world_size(os.environ) or 1
    replicas = world // (p.tensor * p.pipeline * p.context)
    replica, peer = divmod(rank, p.tensor * p.context)
    return [] if peer or replica >= replicas else config.rollout.urls[replica::replicas]


def _refuse_taken_ports(config: Config) -> None:
    """Of the servers that will be started on this machine, where rollout.port names the first."""
    rollout, environ = config.rollout, os.environ
    if not rollout.port or rollout.engine != "server" or rollout.urls:
        return
    p, world = config.parallel, config_checks.world_size(environ) or 1
    here = int(environ.get("LOCAL_WORLD_SIZE", "1")) == world
    replicas = world // (p.tensor * p.pipeline * p.context) if here else 1
    servers = rollout.engines * replicas
    if rollout.port + servers > 1 << 16:
        raise UserError(f"rollout.port = {rollout.port} is the first of {servers} servers' ports, which end at 65535; choose at most {(1 << 16) - servers}")
    # the server of a run that was killed just before may need its time to end
    deadline = time.monotonic() + (CLOSE_S if (Path(config.run.dir) / "rollout.log").exists() else 0.0)
    for index in range(servers):
        while True:
            try:
                pick_port(rollout.port + index)
                break
            except UserError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.5)


def training_limits(config: Config) -> Limits:
    """What an RL run asks of its training records."""
    return _limits(config, config.rollout.max_new_tokens, "rollout.max_new_tokens")


def held_out_limits(config: Config) -> Limits:
    """What an RL run asks of its held-out records."""
    if config.eval.max_new_tokens is None:
        return training_limits(config)
    return _limits(config, config.eval.max_new_tokens, "eval.max_new_tokens")


def _limits(config: Config, new_tokens: int, key: str) -> Limits:
    if config.debug.replay:  # no engine: what was recorded had its room
        return Limits(check=refuse_unusable)
    total = max_model_len(config)
    own = total == model_folder.longest(config.model.path)
    advice = f"the {'model itself (max_position_embeddings);' if own else 'engine; raise rollout.max_model_len or'} lower {key}"
    return Limits(images=MAX_IMAGES, sequence=total, new_tokens=new_tokens, advice=advice, check=refuse_unusable)
