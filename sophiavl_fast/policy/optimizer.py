"""AdamW through megatron-core's distributed optimizer, the learning-rate schedule, and gradients that must be finite."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor, nn

from sophiavl_fast.config import Config, Optim
from sophiavl_fast.errors import EngineError
from sophiavl_fast.policy.distributed import Layout


def learning_rate(optim: Optim, update: int, total: int) -> float:
    """The rate of update number `update` (from 0) of `total`.

    Linear warm-up reaches optim.lr at update warmup_steps; from there constant, or falling to optim.min_lr at `total`
    along a cosine or a line. A pure function of the count, so that a resumed run needs nothing else.
    """
    if update < optim.warmup_steps:
        return optim.lr * (update + 1) / (optim.warmup_steps + 1)
    if optim.schedule == "constant":
        return optim.lr
    done = min(1.0, (update - optim.warmup_steps) / max(1, total - optim.warmup_steps))
    left = (1 + math.cos(math.pi * done)) / 2 if optim.schedule == "cosine" else 1 - done
    return optim.min_lr + (optim.lr - optim.min_lr) * left


def wrap(model: Any) -> DistributedDataParallel:
    """megatron's gradient buffers around the model: fp32, reduced once after the last micro-batch, summed over replicas."""
    model.config.finalize_model_grads_func = _finalize
    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=True)
    return DistributedDataParallel(config=model.config, ddp_config=options, module=model, disable_bucketing=True)


def _finalize(model: list[nn.Module], num_tokens: object = None, **options: object) -> None:
    """Reduce gradients without megatron's division by tokens: losses carry their own global denominator."""
    finalize_model_grads(model, None, **options)


def build_optimizer(config: Config, model: DistributedDataParallel) -> ChainedOptimizer:
    """AdamW, decoupled decay on matrices only (biases and norms have none), fp32 main weights and moments, sharded over replicas."""
    o, dtype = config.optim, model.module.config.params_dtype
    options = OptimizerConfig(
        optimizer="adam", lr=o.lr, min_lr=o.min_lr, weight_decay=o.weight_decay, adam_beta1=o.beta1, adam_beta2=o.beta2, adam_eps=o.eps,
        clip_grad=o.clip_grad, bf16=dtype == torch.bfloat16, params_dtype=dtype, use_distributed_optimizer=True,
    )
    return get_megatron_optimizer(options, [model])


def step(optimizer: ChainedOptimizer, model: DistributedDataParallel, optim: Optim, *, update: int, total: int) -> tuple[float, float]:
    """One AdamW step on the accumulated gradients; returns their global norm before clipping, and the rate used.

    Raises EngineError naming update and parameters when a gradient is not finite: no weight has been touched then.
    """
    rate = learning_rate(optim, update, total)
    for group in optimizer.param_groups:  # megatron leaves both to its scheduler; wd_mult is 0 for biases and norms
        group["lr"], group["weight_decay"] = rate, optim.weight_decay * group["wd_mult"]
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        raise EngineError(f"update {update}: gradient norm is {norm}; first parameters at fault: {_not_finite(model)}")
    if optim.clip_grad > 0:
        for part in optimizer.chained_optimizers:
            clip_grad_by_total_norm_fp32(part.get_parameters(), optim.clip_grad, norm)
    optimizer.step_with_ready_grads()
    return norm, rate


MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class Shard:
    """This replica rank's part of a parameter in the distributed optimizer: flat fp32 main weights [begin:end] and their moments."""

    main: Tensor
    begin: int
    end: int
    moments: dict[str, Tensor]

    def held(self, key: str) -> Tensor:
        """Flat fp32 tensor of one of `state_keys`."""
        return self.main.data if key == "main" else self.moments[key]


def state_keys(dtype: torch.dtype) -> tuple[str, ...]:
    """What the optimizer keeps of a parameter beside its weights of this dtype: fp32 weights are their own main weights."""
    return MOMENTS if dtype == torch.float32 else (*MOMENTS, "main")


def shard_of(optimizer: ChainedOptimizer, parameter: nn.Parameter) -> Shard | None:
    """None where another replica keeps all of the parameter; moments that no step has made yet are made, as zeros."""
    for part in optimizer.chained_optimizers:
        if parameter in part.model_param_group_index_map:
            group, order = part.model_param_group_index_map[parameter]
            main = part.optimizer.param_groups[group]["params"][order]
            state = part.optimizer.state[main]
            if not state:
                state |= {"step": torch.tensor(0.0)} | {key: torch.zeros_like(main) for key in MOMENTS}
            where = part._get_model_param_range_map(parameter)["param"]
            return Shard(main, where.start, where.end, {key: state[key] for key in MOMENTS})
    return None


def set_steps(optimizer: ChainedOptimizer, updates: int) -> None:
    """Every parameter has taken part in every update, so that Adam's step count is one number."""
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            state["step"] = torch.tensor(float(updates))


def gathered(optimizer: ChainedOptimizer, layout: Layout, parameter: nn.Parameter, pick: Callable[[Shard], Tensor]) -> Tensor:
    """The fp32 tensor in the parameter's shape whose parts `pick` takes from each replica's shard; all replicas call it together."""
    whole = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
    if (shard := shard_of(optimizer, parameter)) is not None:
        whole.view(-1)[shard.begin:shard.end] = pick(shard).view(-1)
    return layout.sum_over_shards(whole)


def _not_finite(model: DistributedDataParallel) -> str:
    """Names of this job's parameters with a NaN or Inf gradient, gathered from all ranks."""
    mine = [name for name, p in model.module.named_parameters() if p.requires_grad and not bool(p.main_grad.isfinite().all())]
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine[:3])
    found = sorted({name for names in everyone for name in names})
    return ", ".join(found[:4]) or "none after reduction (overflow in the norm)"
