"""The memory plan against a device: what a run needs beside the policy, whether it fits, and the nearest configuration that does."""
from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from sophiavl_fast import config as tree
from sophiavl_fast import config_checks
from sophiavl_fast.config import Config
from sophiavl_fast.errors import UserError
from sophiavl_fast.monitor import plan, shapes
from sophiavl_fast.monitor.shapes import Sizes

GIB = 2**30
# Resident memory before any tensor of the model, seen on a CPU: a trainer's process with its libraries, and a vLLM server's two (or one inline).
TRAINER_BASE, ENGINE_BASE = 0.65 * GIB, 1.4 * GIB
CPU_KV_CACHE, CPU_BLOCK = 2**30, 128      # as rollout/arguments.py sizes the CPU engine's cache
MOST_PROCESSES = 64                        # of the layouts that are tried
ASSUMED = 80 * GIB                         # a GPU's memory, where a configuration for GPUs is looked at on a machine without


@dataclass(frozen=True, slots=True)
class Device:
    """What each rank has: bytes of its GPU (assumed: of one that is not here), or its share of the host's free memory."""

    cuda: bool
    bytes: float
    logprob: str
    assumed: bool = False

    @property
    def name(self) -> str:
        return ("assumed GPU" if self.assumed else "GPU") if self.cuda else "share of the free host memory"


@dataclass(frozen=True, slots=True)
class Need:
    """The worst rank of a stage: its largest phase, and all that is on its device then."""

    stage: int
    phase: str
    items: dict[str, float]

    @property
    def bytes(self) -> float:
        return sum(self.items.values())

    def text(self, least: float = 0.01) -> str:
        """Total, phase and items in GiB; items below this share of the whole are left out."""
        parts = sorted(((k, v) for k, v in self.items.items() if v > least * self.bytes), key=lambda entry: -entry[1])
        return f"{gib(self.bytes)} GiB at its peak ({self.phase}: {', '.join(f'{k} {gib(v)}' for k, v in parts)})"


def gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= GIB else f"{size / GIB:.2g}"


def device_of(config: Config, gpus: list[dict], processes: int) -> Device:
    """gpus: dicts with `gib`, those of this machine. device: cpu, or auto without any, is the host. processes: ranks on this machine."""
    if (gpus and config.device != "cpu") or config.device == "cuda":
        size = min((g["gib"] * GIB for g in gpus), default=ASSUMED)
        return Device(True, size, "reference" if config.policy.kernels == "reference" else "triton", assumed=not gpus)
    return Device(False, psutil.virtual_memory().available / processes, _cpu_logprob(config))


def _cpu_logprob(config: Config) -> str:
    try:
        import torch

        from sophiavl_fast.kernels.dispatch import resolve

        return resolve("linear_logprob", config.policy.kernels, torch.device("cpu"), getattr(torch, config.model.dtype))
    except (ImportError, ValueError):  # the doctor says elsewhere what is wrong
        return "reference"


def needs(config: Config, sizes: Sizes, world: int, device: Device) -> list[Need]:
    """One entry for each pipeline stage, libraries included. A replica's one engine beside the trainer is on its lead's device, as the judge: stage 0's."""
    row = plan.fullest_row(config, sizes)
    replicas = world // (config.parallel.tensor * config.parallel.pipeline * config.parallel.context)
    found = []
    for stage in range(config.parallel.pipeline):
        phases = plan.phases(config, sizes, row, plan.Place(stage=stage, replicas=replicas, cuda=device.cuda, logprob=device.logprob))
        held = engine(config, sizes, device) * (stage == 0)
        beside = {phase: {"engine": held * (not _asleep(config, device, phase)), "judge": judge(config, device, phase) * (stage == 0),
                          "libraries": 0 if device.cuda else TRAINER_BASE} for phase in phases}
        found.append(max((Need(stage, phase, items | beside[phase]) for phase, items in phases.items()), key=lambda need: need.bytes))
    return found


def _asleep(config: Config, device: Device, phase: str) -> bool:
    """Whether the engine has left the device's memory to this phase. A CPU's engine is told to, and keeps all."""
    return config.rollout.sleep and device.cuda and phase in plan.ENGINE_SLEEPS


def engine(config: Config, sizes: Sizes, device: Device) -> float:
    """Bytes that a rollout engine on the same device takes: its share of a GPU; on a CPU weights, cache and libraries. 0: it is elsewhere."""
    if config.recipe != "rl" or config.rollout.urls or config.rollout.gpus or config.debug.replay:
        return 0
    if device.cuda:
        return config.rollout.gpu_memory_utilization * device.bytes
    return config.rollout.engines * (plan.bytes_of(config) * sizes.total + kv_cache(config, sizes) + ENGINE_BASE)


def judge(config: Config, device: Device, phase: str) -> float:
    """Bytes of the thinking reward model on the first stage's device: in the leads' own process, or served from the first one's GPU; 0: it is elsewhere."""
    thinking = config.thinking
    if config.recipe != "rl" or config.algorithm.name == "grpo" or not (thinking.backend == "local" or thinking.serve):
        return 0
    if thinking.serve and device.cuda:
        return 0 if thinking.gpus or (thinking.sleep and phase in plan.ENGINE_SLEEPS) else thinking.gpu_memory * device.bytes
    try:
        sizes = shapes.read(thinking.path)
    except UserError:      # what opens it says so
        return 0
    return plan.bytes_of(config) * sizes.total + (ENGINE_BASE + CPU_KV_CACHE if thinking.serve else 0)


def kv_cache(config: Config, sizes: Sizes) -> float:
    """Of the CPU engine: as much as its sequences at full length can fill, up to a GiB."""
    m, length = sizes.language, config.rollout.max_model_len or config.data.max_prompt_tokens + config.rollout.max_new_tokens
    blocks = 1 + config.rollout.max_num_seqs * -(-length // CPU_BLOCK)
    return min(CPU_KV_CACHE, blocks * CPU_BLOCK * 2 * m.layers * m.key * plan.bytes_of(config))


def fits(found: list[Need], config: Config, device: Device) -> bool:
    return max(n.bytes for n in found) <= config.memory.fraction * device.bytes


def require(config: Config, world: int, device: Device | None = None) -> None:
    """Refuse (UserError) a layout that the model rules out, and, by memory.check, refuse or warn of a run whose predicted peak does not fit.

    Models that the plan cannot read are left to the policy.
    """
    try:
        sizes = shapes.read(config.model.path)
    except UserError:
        return
    shapes.check_layout(sizes, config.parallel)
    if config.memory.check == "off":
        return
    device = device or _this_device(config)
    if device.assumed:
        return    # that there is no GPU is said by the policy
    found = needs(config, sizes, world, device)
    if fits(found, config, device):
        return
    worst, rest = max(found, key=lambda n: n.bytes), advice(config, sizes, world, device)
    have = gib(config.memory.fraction * device.bytes)
    line = (f"does not fit: a rank of pipeline stage {worst.stage} needs {worst.text()}, but has {have} GiB "
            f"(memory.fraction {config.memory.fraction:g} of its {device.name}, {gib(device.bytes)} GiB); {rest}")
    if config.memory.check == "refuse":
        raise UserError(f"{line}; memory.check=warn starts all the same")
    if os.environ.get("RANK", "0") == "0":
        print(f"sophiavl-fast: {line}", file=sys.stderr, flush=True)


def _this_device(config: Config) -> Device:
    import torch

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = [{"gib": torch.cuda.get_device_properties(i).total_memory / GIB} for i in range(torch.cuda.device_count())] if config.device != "cpu" else []
    return device_of(config, gpus, local)


def advice(config: Config, sizes: Sizes, world: int, device: Device) -> str:
    """The change with the least cost that fits, as overrides; or that none of those tried does."""
    best: tuple[float, str, float] | None = None
    for cost, changes, processes, other in _neighbours(config, sizes, world, device):
        if best is None or cost < best[0]:
            found = needs(other, sizes, processes, device)
            if fits(found, other, device):
                more = f" on {processes} processes" if processes != world else ""
                best = cost, f"{' '.join(changes) or 'the same'}{more}", max(n.bytes for n in found)
    if best is None:
        apart = config.rollout.model_copy(update={"urls": ["http://other:8000"], "gpus": [], "engine": "server", "transfer": "auto", "sleep": False})
        alone = needs(config.model_copy(update={"rollout": apart}), sizes, world, device)
        if config.recipe == "rl" and device.cuda and fits(alone, config, device):
            return f"with the engines on other GPUs (rollout.urls) a rank would need {gib(max(n.bytes for n in alone))} GiB"
        beside = f" beside engines on GPUs of the same node (rollout.gpus = {config.rollout.gpus})" if config.rollout.gpus else ""
        return f"no layout of up to {MOST_PROCESSES} such devices{beside} fits either: take fewer or shorter responses, smaller images or a smaller model"
    return f"{best[1]} would fit with {gib(best[2])} GiB a rank"


def _neighbours(config: Config, sizes: Sizes, world: int, device: Device) -> Iterator[tuple[float, list[str], int, Config]]:
    """(cost, overrides, processes, configuration): options before layouts before more processes."""
    p, r, options = config.parallel, config.rollout, config.policy
    rows = [options.tokens_per_row >> i for i in range(options.tokens_per_row.bit_length()) if i == 0 or options.tokens_per_row >> i >= 512]
    processes = [world] if not device.cuda else [world * 2**i for i in range(7) if world * 2**i <= MOST_PROCESSES]
    layouts = itertools.product(processes, (1, 2, 4, 8), (1, 2, 4, 8), sorted({p.context, 1, 2, 4, 8}), {p.sequence, True})
    aside = {(options.offload_reference, options.offload_optimizer), *(((True, options.offload_optimizer), (True, True)) if device.cuda else ())}
    sleeps = {r.sleep, r.sleep or (device.cuda and not r.staleness and engine(config, sizes, device) > 0)}
    choices = itertools.product(layouts, {options.recompute, True}, sorted(aside), sorted(sleeps), rows)
    for (count, t, s, c, sequence), recompute, (offload, state), sleep, tokens in choices:
        wanted = {"parallel.tensor": (p.tensor, t), "parallel.pipeline": (p.pipeline, s), "parallel.context": (p.context, c),
                  "parallel.sequence": (p.sequence, sequence),
                  "policy.recompute": (options.recompute, recompute), "policy.offload_reference": (options.offload_reference, offload),
                  "policy.offload_optimizer": (options.offload_optimizer, state), "rollout.sleep": (r.sleep, sleep),
                  "policy.tokens_per_row": (options.tokens_per_row, tokens)}
        changes = [f"{key}={str(new).lower()}" for key, (old, new) in wanted.items() if old != new]
        if not changes and count == world:
            continue
        gpus = _gpus_apart(config, count, device)
        changes += [f"rollout.gpus=[{','.join(map(str, gpus))}]"] if gpus != r.gpus else []
        data = p.data if p.data == count // (t * s * c) else None       # what the new layout contradicts goes, and is named
        stages = p.stages if s == p.pipeline else None
        changes += [f"parallel.{key}=null" for key, old, new in (("data", p.data, data), ("stages", p.stages, stages)) if old != new]
        other = config.model_copy(update={
            "rollout": r.model_copy(update={"sleep": sleep, "gpus": gpus}),
            "parallel": p.model_copy(update={"tensor": t, "pipeline": s, "context": c, "sequence": sequence, "data": data, "stages": stages}),
            "policy": options.model_copy(update={"recompute": recompute, "offload_reference": offload, "offload_optimizer": state, "tokens_per_row": tokens})})
        if _possible(other, sizes, count, device):
            steps = sum(weight * abs(new.bit_length() - old.bit_length()) for weight, old, new in ((1, p.tensor, t), (1.5, p.pipeline, s), (1.2, p.context, c)))
            shorter = options.tokens_per_row.bit_length() - tokens.bit_length()
            moved = 0.5 * (offload != options.offload_reference) + (state != options.offload_optimizer) + 0.8 * (sleep != r.sleep)
            cost = steps + 0.5 * (sequence != p.sequence) + (recompute != options.recompute) + moved + 0.6 * shorter
            yield cost + 8 * (count // world - 1), changes, count, other


def _gpus_apart(config: Config, processes: int, device: Device) -> list[int]:
    """rollout.gpus; where so many processes would take some of them, those behind, if a node may have them."""
    gpus = config.rollout.gpus
    try:
        config_checks.check_gpus(config, processes, os.environ, cuda=device.cuda)
    except UserError:
        behind = list(range(processes, processes + len(gpus)))
        return behind if behind[-1] < config_checks.node_gpus(gpus) else gpus
    return gpus


def _possible(config: Config, sizes: Sizes, world: int, device: Device) -> bool:
    """Whether `train` would begin with the layout at all, its memory aside."""
    try:
        shapes.check_layout(sizes, config.parallel)
        tree.check(config, world)
        config_checks.check_gpus(config, world, os.environ, cuda=device.cuda)
    except UserError:
        return False
    return True
