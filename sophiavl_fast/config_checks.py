"""What of a configuration (config.Config) can be refused before a model loads: values out of range, combinations that cannot run."""
from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sophiavl_fast import config_ranges, model_folder, recorded
from sophiavl_fast.errors import UserError

TOKEN_VARIABLE = "SOPHIAVL_ROLLOUT_TOKEN"


def least_processes(config: Any) -> int:
    """How many processes the layout asks for: parallel.data replicas, else as many as rollout.gpus has engines for, else one."""
    p, r = config.parallel, config.rollout
    replicas = p.data or (max(1, len(r.gpus) // (r.engines * r.tensor_parallel)) if config.recipe == "rl" else 1)
    return p.tensor * p.pipeline * p.context * replicas


def world_size(environ: Mapping[str, str]) -> int | None:
    """torchrun's number of processes, None where nothing says it. Raises UserError where WORLD_SIZE is no whole number of at least 1."""
    text = environ.get("WORLD_SIZE")
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"the environment variable WORLD_SIZE = '{text}': expected a whole number of at least 1")
    return int(text)


def launched(environ: Mapping[str, str]) -> int:
    """How many processes this run is, this one with them. Raises UserError where a launcher has set WORLD_SIZE, but not what they meet by."""
    size = world_size(environ) or 1
    if size == 1:
        return 1
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]:
        raise UserError(f"the environment variable WORLD_SIZE = {size} is set without {', '.join(missing)}: each of {size} processes needs its RANK (from 0), "
                        "and the address of the first and a free port there, all of which torchrun sets; for one process alone unset WORLD_SIZE")
    rank, port = environ["RANK"], environ["MASTER_PORT"]
    if not rank.isdecimal() or int(rank) >= size:
        raise UserError(f"the environment variable RANK = '{rank}': expected a whole number from 0 to {size - 1} (WORLD_SIZE - 1)")
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"the environment variable MASTER_PORT = '{port}': expected a port from 1 to 65535")
    return size


def refuse_alone(config: Any, command: str) -> None:
    """UserError for a layout of several processes that no launcher has started; command: what each of them runs. Of the checks the first."""
    p = config.parallel
    config_ranges.check(config.model_dump())
    if p.tensor * p.pipeline * p.context * (p.data or 1) > 1:
        needed = least_processes(config)
        asked = ", ".join(f"parallel.{key} = {getattr(p, key)}" for key in ("tensor", "pipeline", "context", "data") if (getattr(p, key) or 1) > 1)
        raise UserError(f"{asked}: this needs {needed} processes, but it was started as one, without a launcher; "
                        f"start it by `torchrun --nproc-per-node {needed} -m sophiavl_fast {command}`")


def speaks(environ: Mapping[str, str]) -> bool:
    """Whether this process tells of bad input: the first rank does, and one whose RANK is none of the run's."""
    rank, size = environ.get("RANK", ""), environ.get("WORLD_SIZE", "")
    return not rank.isdecimal() or int(rank) == 0 or (size.isdecimal() and int(rank) >= int(size))


def check(config: Any, world_size: int | None = 1) -> None:
    """Everything that can be refused before a model loads; `check_start` adds what a run needs around it. Raises UserError.

    world_size: processes of the run; None for `least_processes`.
    """
    c, p = config, config.parallel
    config_ranges.check(c.model_dump())
    world_size = least_processes(c) if world_size is None else world_size
    if c.model.min_pixels is not None and c.model.max_pixels is not None and c.model.min_pixels > c.model.max_pixels:
        raise UserError(f"model.min_pixels = {c.model.min_pixels} is more than model.max_pixels = {c.model.max_pixels}")
    model_parallel = p.tensor * p.pipeline * p.context
    if world_size % model_parallel:
        raise UserError(f"parallel.tensor x pipeline x context = {model_parallel} does not divide the {world_size} processes")
    replicas = world_size // model_parallel
    if p.data is not None and p.data != replicas:
        raise UserError(f"parallel.data = {p.data}, but {world_size} processes / (tensor {p.tensor} x pipeline {p.pipeline} x context {p.context}) "
                        f"leave {replicas}")
    if c.policy.attention == "flash_attn" and (c.device == "cpu" or c.model.dtype == "float32"):
        raise UserError(f"policy.attention = flash_attn is for bf16 on a GPU (here device: {c.device}, model.dtype: {c.model.dtype}); use varlen")
    if p.sequence and p.tensor == 1:
        raise UserError("parallel.sequence: true needs parallel.tensor > 1")
    if c.recipe == "rl":
        _check_rl(c, replicas, world_size)
    elif c.sft.batch_size % replicas:
        raise UserError(f"sft.batch_size = {c.sft.batch_size} does not divide over {replicas} data-parallel replicas")
    if not c.model.path:
        raise UserError("model.path is empty: name a Hugging Face folder")
    if not c.data.train:
        raise UserError("data.train is empty: name a dataset of the registry")


def _check_rl(c: Any, replicas: int, world_size: int) -> None:
    prompts = c.rollout.prompts_per_step
    if prompts % replicas:
        raise UserError(f"rollout.prompts_per_step = {prompts} does not divide over {replicas} data-parallel replicas")
    if prompts // replicas % c.algorithm.mini_batches:
        raise UserError(f"rollout.prompts_per_step = {prompts} (over {replicas} replicas) does not divide into "
                        f"algorithm.mini_batches = {c.algorithm.mini_batches}")
    for key in ("record", "replay"):
        if getattr(c.debug, key) == "":
            raise UserError(f"debug.{key} = '' names no folder; name one, or null for none")
    if c.debug.replay:
        if c.debug.record or c.debug.rollout_only:
            raise UserError("debug.replay starts no engine: debug.record and debug.rollout_only have nothing to act on")
        if c.eval.every:
            recorded.refuse_missing(c.debug.replay)  # else the first thing wrong is told second
            raise UserError(f"debug.replay starts no engine, so nothing answers the held-out questions; set eval.every=0 (it is {c.eval.every})")
    elif c.rollout.engine == "inline":
        if world_size > 1:
            raise UserError("rollout.engine: inline holds the engine in a single-process trainer; use server with several processes")
        if c.rollout.urls:
            raise UserError("rollout.urls is set, but rollout.engine is inline; use rollout.engine=server")
        if c.rollout.transfer not in ("auto", "inproc"):
            raise UserError(f"rollout.transfer = {c.rollout.transfer} needs rollout.engine: server; inline uses inproc")
        if c.rollout.engines > 1 or c.rollout.gpus:
            raise UserError("rollout.engines and rollout.gpus are for spawned servers; use rollout.engine=server")
        if c.rollout.tensor_parallel > 1:
            raise UserError(f"rollout.tensor_parallel = {c.rollout.tensor_parallel}: rollout.engine: inline is an engine of one device in the trainer's "
                            "process; use rollout.engine=server with rollout.gpus or rollout.urls")
    elif c.rollout.transfer == "inproc":
        raise UserError("rollout.transfer = inproc needs rollout.engine: inline")
    elif c.rollout.transfer in ("nccl", "ipc") and c.device == "cpu":
        raise UserError(f"rollout.transfer = {c.rollout.transfer} needs a GPU; on device: cpu use gloo (or auto)")
    _check_engines(c.rollout, replicas)
    if c.rollout.urls and not c.debug.replay:
        _check_urls(c.rollout, replicas)
    if c.rollout.staleness and (c.rollout.engine == "inline" or c.debug.replay):
        holder = "debug.replay starts no engine" if c.debug.replay else "rollout.engine: inline shares the trainer's process"
        raise UserError(f"rollout.staleness = {c.rollout.staleness}, but {holder}; sampling ahead needs rollout.engine: server")
    _check_sampling(c)
    if c.algorithm.sigma_filter is not None and c.algorithm.normalize != "batch":
        raise UserError("algorithm.sigma_filter needs algorithm.normalize: batch")
    if c.algorithm.dual_clip is not None and c.algorithm.variant != "ppo":
        raise UserError(f"algorithm.dual_clip = {c.algorithm.dual_clip} needs algorithm.variant: ppo")
    if c.thinking.backend == "local" and not c.thinking.path:
        raise UserError("thinking.backend: local needs thinking.path, the folder of the thinking reward model")
    _check_served_judge(c)
    if c.thinking.backend == "endpoint" and not c.thinking.serve and not c.thinking.url:
        raise UserError("thinking.backend: endpoint needs thinking.url (or OPENAI_API_URL), or thinking.serve: true with thinking.path")
    if c.thinking.backend == "endpoint" and not c.thinking.model:
        raise UserError("thinking.backend: endpoint needs thinking.model (or REWARD_MODEL)")
    if c.trust.mode == "variance" and c.thinking.backend != "off" and c.thinking.samples < 2:
        raise UserError(f"trust.mode: variance needs thinking.samples > 1 (it is {c.thinking.samples})")
    if c.eval.every and not c.data.eval:
        raise UserError("eval.every is set, but data.eval names no dataset")


def _check_served_judge(c: Any) -> None:
    t = c.thinking
    if not t.serve:
        for key in ("sleep", "gpus"):
            if getattr(t, key):
                raise UserError(f"thinking.{key} is about a judge that the run serves itself: it needs thinking.serve: true")
        return
    if t.backend != "endpoint":
        raise UserError(f"thinking.serve: true needs thinking.backend: endpoint (it is {t.backend})")
    if t.url:
        raise UserError(f"thinking.serve: true starts a server of its own, but thinking.url names one ({t.url}): leave one of them out")
    if not t.path:
        raise UserError("thinking.serve: true needs thinking.path, the folder of the thinking reward model")
    model_folder.refuse_missing(t.path, "thinking.path")
    if len(set(t.gpus)) < len(t.gpus) or set(t.gpus) & set(c.rollout.gpus):
        raise UserError(f"thinking.gpus = {t.gpus}: name different GPUs, and none of rollout.gpus ({c.rollout.gpus})")
    if t.sleep and t.gpus:
        raise UserError(f"thinking.sleep: true is for a GPU that the judge shares with the trainer; on thinking.gpus = {t.gpus} nobody waits for its memory")
    if t.sleep and c.rollout.staleness:
        raise UserError(f"thinking.sleep: true needs rollout.staleness: 0 (it is {c.rollout.staleness}): a judge of rollouts ahead is never idle")


def even_stages(layers: int, pipeline: int, first: int = 0) -> list[int]:
    """Layers of each pipeline stage, later ones taking what is left over; the first has `first` of them at least."""
    shares = [layers // pipeline + (i >= pipeline - layers % pipeline) for i in range(pipeline)]
    return shares if shares[0] >= first or pipeline == 1 else [first, *even_stages(layers - first, pipeline - 1)]


def check_layout(parallel: Any, *, heads: int, key_heads: int, ffn: int, layers: int, deepstack: int, family: str) -> None:
    """What a model's sizes rule out of parallel.tensor, pipeline and stages (a vocabulary is padded). Raises UserError.

    deepstack: the number of first layers to which the family adds image features, all on the first stage.
    """
    tensor, n, wish = parallel.tensor, parallel.pipeline, parallel.stages
    common = math.gcd(heads, key_heads, ffn)
    for key, size in {"num_attention_heads": heads, "num_query_groups": key_heads, "ffn_hidden_size": ffn}.items():
        if size % tensor:
            valid = ", ".join(str(t) for t in range(1, common + 1) if common % t == 0)
            raise UserError(f"parallel.tensor = {tensor} does not divide the model's {key} = {size}; valid: {valid}")
    if n > layers:
        raise UserError(f"parallel.pipeline = {n} is more than the model's {layers} layers; at most {layers} stages hold one each")
    shares, better = wish or even_stages(layers, n), even_stages(layers, n, deepstack)
    possible = min(better) > 0
    if len(shares) != n or sum(shares) != layers or min(shares) < 1:
        raise UserError(f"parallel.stages = {shares}: parallel.pipeline = {n} wants {n} shares of at least one layer, {layers} in all"
                        f"{f', such as {better}' * possible}")
    if not wish and layers % n and possible:
        raise UserError(f"parallel.pipeline = {n} does not divide the model's {layers} layers; set the shares by parallel.stages={better}")
    if shares[0] < deepstack:
        raise UserError(f"the first pipeline stage holds {shares[0]} layers, but {family} adds image features to its first {deepstack} "
                        f"(DeepStack): lower parallel.pipeline = {n}, or begin parallel.stages with at least {deepstack}{f', such as {better}' * possible}")


def _check_engines(r: Any, replicas: int) -> None:
    if r.urls and (r.engines > 1 or r.gpus):
        raise UserError("rollout.urls names servers that run already: rollout.engines and rollout.gpus have nothing to act on")
    needed = r.engines * r.tensor_parallel * replicas
    if r.gpus and (len(r.gpus) != needed or len(set(r.gpus)) < needed):
        raise UserError(f"rollout.gpus = {r.gpus}: {r.engines} engines x rollout.tensor_parallel {r.tensor_parallel} x {replicas} replicas "
                        f"need {needed} different GPUs")
    if r.sleep and (r.urls or r.gpus or r.staleness):
        why = (f"rollout.staleness: 0 (it is {r.staleness}): engines that sample ahead of the policy are never idle" if r.staleness else
               f"engines on the trainer's own GPUs: the memory of those {'of rollout.urls' if r.urls else 'on rollout.gpus'} is of no use to it")
        raise UserError(f"rollout.sleep: true needs {why}")
    if r.gpus and r.transfer == "ipc":
        raise UserError("rollout.transfer = ipc reaches engines on the trainer's own GPU only, but rollout.gpus names others; use nccl")


def _check_urls(rollout: Any, replicas: int) -> None:
    urls = rollout.urls
    for url in urls:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not (parts.path or parts.query or parts.fragment)
        except ValueError:      # a port or an address in brackets that is none
            usable = False
        if not usable:
            raise UserError(f"rollout.urls: '{url}' is no server's URL, such as http://127.0.0.1:8000")
        if ":" in parts.hostname and not rollout.transfer_host:
            raise UserError(f"rollout.urls: '{url}' is an IPv6 address, but weights travel by IPv4: name the server by its IPv4 address, "
                            "or set rollout.transfer_host to this machine's")
    if twice := sorted({url for url in urls if urls.count(url) > 1}):
        raise UserError(f"rollout.urls names '{twice[0]}' twice; each engine is one replica's")
    if len(urls) < replicas:
        raise UserError(f"rollout.urls names {len(urls)} servers for {replicas} data-parallel replicas; each replica needs its own")


def check_start(config: Any, environ: Mapping[str, str]) -> None:
    """What a run must find where it starts, and a configuration that is only read need not: room for its engines, a token. Raises UserError."""
    check_placement(config)
    if config.rollout.gpus:     # a launcher that does not say how many of its processes are here is taken for one that has one here
        check_gpus(config, (world_size(environ) or 1) if "LOCAL_WORLD_SIZE" in environ else 1, environ, cuda=_on_gpus(config.device))
    if config.run.export:
        refuse_no_place(config.run.export, "run.export = ")
    if config.recipe == "rl" and config.rollout.urls and not config.debug.replay and not environ.get(TOKEN_VARIABLE):
        raise UserError(f"rollout.urls is set, but not the environment variable {TOKEN_VARIABLE} with the servers' token: "
                        "the one that `python -m sophiavl_fast.rollout.serve CONFIG` was started with")


def refuse_no_place(folder: str | Path, option: str = "") -> None:
    """UserError where no folder can be made at this path: something above it is no folder, or takes nothing. Known before hours of work end there."""
    path = Path(folder).absolute()
    above = next(p for p in (path, *path.parents) if os.path.exists(p))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{option}'{folder}' cannot be made: " + (f"nothing can be written in '{above}'" if above.is_dir() else f"'{above}' is a file"))


def check_gpus(config: Any, processes: int, environ: Mapping[str, str], *, cuda: bool) -> None:
    """Refuse (UserError) rollout.gpus that the trainer's processes are on, or that one node of several cannot have.

    processes: of the run that `environ` is of, or of one that is thought of: then they are on one node while it may have a GPU for each.
    """
    gpus = config.rollout.gpus
    if config.recipe != "rl" or not gpus:
        return
    launched_here = "LOCAL_WORLD_SIZE" in environ and processes == (world_size(environ) or 1)
    local = int(environ["LOCAL_WORLD_SIZE"]) if launched_here else min(processes, node_gpus(gpus)) if cuda else processes
    if processes > local:
        raise UserError(f"rollout.gpus = {gpus} are the GPUs of one node, but this run's {processes} processes are on several, {local} on this one; "
                        "start the engines with `python -m sophiavl_fast.rollout.serve` and name them in rollout.urls, or leave them the trainer's own GPUs")
    taken = [gpu for gpu in gpus if gpu < local]
    if taken and cuda and "CUDA_VISIBLE_DEVICES" not in environ:
        raise UserError(f"rollout.gpus = {gpus}: the trainer's processes are on the first {local} GPUs, so GPU {taken[0]} is no engine's own; begin at {local}")


def node_gpus(gpus: Sequence[int]) -> int:
    """How many GPUs a node has that nothing else tells of: eight, or as many as rollout.gpus says."""
    return max([8, *(gpu + 1 for gpu in gpus)])


def check_placement(config: Any) -> None:
    """Refuse (UserError) engines that have no GPU of their own; a server started by hand (rollout.serve) has them all, so `check` lets it pass."""
    r = config.rollout
    wide, apart, beside = r.engines * r.tensor_parallel > 1, r.transfer in ("nccl", "ipc"), not r.gpus and not r.urls
    if config.recipe != "rl" or config.debug.replay or not (apart or (wide and beside)):
        return
    if not _on_gpus(config.device):
        if apart:
            raise UserError(f"rollout.transfer = {r.transfer} needs a GPU, and there is none; on a CPU use gloo (or auto)")
    elif r.transfer == "nccl" and beside:
        raise UserError("rollout.transfer = nccl reaches engines on GPUs of their own: name them in rollout.gpus, or running servers in rollout.urls; "
                        "an engine beside the trainer takes ipc (or auto)")
    elif wide and beside:
        key, size = ("tensor_parallel", r.tensor_parallel) if r.tensor_parallel > 1 else ("engines", r.engines)
        raise UserError(f"rollout.{key} = {size}: beside the trainer a replica has one engine, on its first rank's GPU alone; give engines GPUs of their own "
                        "by rollout.gpus, or name running servers in rollout.urls")


def _on_gpus(device: str) -> bool:
    if device != "auto":
        return bool(device == "cuda")
    from torch import cuda

    return cuda.is_available()


def _check_sampling(c: Any) -> None:
    """Dynamic sampling and the overlong penalty."""
    r, longest = c.rollout, c.rollout.max_new_tokens if c.rewards.overlong_max is None else c.rewards.overlong_max
    if r.resample and r.staleness:
        raise UserError(f"rollout.resample = {r.resample} needs rollout.staleness: 0 (it is {r.staleness}): a step that is sampled ahead is not yet scored")
    if r.resample and (c.debug.record or c.debug.replay):
        raise UserError(f"rollout.resample = {r.resample}: debug.record and debug.replay keep one round of responses a step; set rollout.resample=0")
    if r.resample and c.algorithm.normalize not in ("std", "mean"):
        raise UserError(f"rollout.resample = {r.resample} needs algorithm.normalize: std or mean (it is {c.algorithm.normalize}): "
                        "only there has a group without signal advantage 0")
    if not 0 <= c.rewards.overlong_cache <= longest or longest > r.max_new_tokens:
        raise UserError(f"rewards.overlong_cache = {c.rewards.overlong_cache}, rewards.overlong_max = {longest}: "
                        f"expected 0 <= cache <= max <= rollout.max_new_tokens ({r.max_new_tokens})")
