"""Process groups: torch.distributed, megatron-core's parallel state, and a gloo control group with its own deadline."""
from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor
from torch.distributed import ProcessGroup

from sophiavl_fast import config_checks
from sophiavl_fast.compat.megatron_cpu import without_cuda
from sophiavl_fast.config import Config
from sophiavl_fast.errors import EngineError, UserError
from sophiavl_fast.types import Batch


@dataclass(slots=True, kw_only=True)
class Layout:
    """Where this process stands. `lead` is the replica's first rank (tensor, context and pipeline 0): it reads data and asks the engines."""

    device: torch.device
    tensor: int
    pipeline: int
    context: int
    sequence: bool
    replica: int
    replicas: int
    lead: bool
    first_stage: bool
    last_stage: bool
    tp_group: ProcessGroup
    pp_group: ProcessGroup
    dp_group: ProcessGroup
    cp_group: ProcessGroup
    peers: ProcessGroup      # gloo: the ranks that hold one replica
    first_stage_peers: ProcessGroup  # gloo: those of them that hold its first stage
    control: ProcessGroup    # gloo: all ranks, deadline policy.control_timeout_s
    deadline: timedelta
    replicas_control: ProcessGroup  # gloo: this rank's counterparts in the other replicas
    shards: ProcessGroup     # the ranks over which the optimizer is sharded: those counterparts and their context-parallel peers
    peer_ranks: list[int]    # global ranks of `peers`, the lead first
    owns_process_group: bool

    @property
    def row_multiple(self) -> int:
        """What a packed row's length must be a multiple of: slices of a row are equal."""
        return (self.tensor if self.sequence else 1) * (2 * self.context if self.context > 1 else 1)

    def wait(self, phase: str) -> None:
        """Meet all ranks; whoever does not come by the deadline is named in the EngineError."""
        if dist.get_world_size() == 1:
            return
        try:
            dist.monitored_barrier(self.control, timeout=self.deadline, wait_all_ranks=True)   # its own default is not the group's
        except RuntimeError as error:
            raise EngineError(f"{phase}: a trainer rank did not answer: {str(error).splitlines()[0]}") from error

    def share(self, value: Any) -> Any:
        """The lead's object on every rank of its replica."""
        return value if len(self.peer_ranks) == 1 else self._broadcast(value, self.peers, self.peer_ranks[0])

    def _broadcast(self, value: Any, group: ProcessGroup, source: int) -> Any:
        box = [value]
        try:
            dist.broadcast_object_list(box, src=source, group=group)
        except RuntimeError as error:
            raise EngineError(f"rank {dist.get_rank()} waited for rank {source} in vain: {str(error).splitlines()[0]}") from error
        return box[0]

    def share_rows(self, rows: list[Batch] | None) -> list[Batch]:
        """The lead's rows on every rank of its replica; pixels, the bulk of them, stay on the first stage."""
        light = self.share([replace(r, pixel_values=None) for r in rows] if rows is not None else None)
        pixels = [r.pixel_values for r in rows] if rows is not None else None
        if self.first_stage and self.tensor * self.context > 1:
            pixels = self._broadcast(pixels, self.first_stage_peers, self.peer_ranks[0])
        return [replace(r, pixel_values=p) for r, p in zip(light, pixels or [])] if self.first_stage else light

    def sum_over_replicas(self, tensor: Tensor) -> Tensor:
        """The sum of every replica's tensor, which may lie on the CPU or on the device; the argument is left as it is."""
        return self._over_replicas(tensor, dist.ReduceOp.SUM)

    def max_over_replicas(self, tensor: Tensor) -> Tensor:
        """The largest of every replica's tensor, element by element; infinity for a NaN, which the reduction may lose."""
        return self._over_replicas(tensor.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf), dist.ReduceOp.MAX)

    def _over_replicas(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        total = tensor.detach().clone()
        if self.replicas > 1 and total.numel():
            dist.all_reduce(total, op=operation, group=self.dp_group if total.device.type == "cuda" else self.replicas_control)
        return total

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks that share the optimizer's state; the argument, on the device, is overwritten."""
        if self.replicas * self.context > 1:
            dist.all_reduce(tensor, group=self.shards)
        return tensor

    def gather_replicas(self, value: Any) -> list[Any]:
        """Every replica's object, in the order of the replicas, on the counterparts of this rank."""
        if self.replicas == 1:
            return [value]
        found: list[Any] = [None] * self.replicas
        try:
            dist.all_gather_object(found, value, group=self.replicas_control)
        except RuntimeError as error:
            raise EngineError(f"replica {self.replica} waited for another replica in vain: {str(error).splitlines()[0]}") from error
        return found

    def close(self) -> None:
        """Undo `open_layout`; a process group that was there before stays."""
        parallel_state.destroy_model_parallel()
        if self.owns_process_group:
            dist.destroy_process_group()


def open_layout(config: Config) -> Layout:
    """Join the run's other ranks, whoever started them, or stand alone. Raises UserError for a device that is not there."""
    device = choose_device(config.device)
    deadline = timedelta(seconds=config.policy.control_timeout_s)
    owns = not dist.is_initialized()
    if owns:
        _initialise(device, deadline)
    if (asked := config_checks.world_size(os.environ)) not in (None, dist.get_world_size()):
        raise UserError(f"the environment variable WORLD_SIZE = {asked}, but the process group that was found has {dist.get_world_size()} processes")
    shape = config.parallel
    with without_cuda(device):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=shape.tensor, pipeline_model_parallel_size=shape.pipeline, context_parallel_size=shape.context,
            distributed_timeout_minutes=max(1, int(config.policy.control_timeout_s // 60)),
        )
        tensor_parallel.model_parallel_cuda_manual_seed(config.run.seed + 1)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    peers, first_stage_peers, peer_ranks = _peers(shape.tensor * shape.context, shape.pipeline, replica, replicas, deadline)
    return Layout(
        device=device, tensor=shape.tensor, pipeline=shape.pipeline, context=shape.context, sequence=shape.sequence, replica=replica, replicas=replicas,
        lead=dist.get_rank() == peer_ranks[0], first_stage=parallel_state.is_pipeline_first_stage(),
        last_stage=parallel_state.is_pipeline_last_stage(), tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(), dp_group=parallel_state.get_data_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(), shards=parallel_state.get_data_parallel_group(with_context_parallel=True),
        peers=peers, first_stage_peers=first_stage_peers, peer_ranks=peer_ranks, control=dist.new_group(backend="gloo", timeout=deadline),
        deadline=deadline, replicas_control=parallel_state.get_data_parallel_group_gloo(), owns_process_group=owns,
    )


def choose_device(wish: str) -> torch.device:
    """`auto` takes this rank's GPU where there is one. Raises UserError for cuda without a GPU, and for a rank of several that is not told which."""
    if wish == "cuda" and not torch.cuda.is_available():
        raise UserError("device = cuda, but this machine shows no CUDA device; use device=cpu or device=auto")
    if wish == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if config_checks.launched(os.environ) > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError("the environment variable LOCAL_RANK is not set: each process of a node needs a number from 0, which is its GPU; torchrun sets it")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False   # convolutions take it by default: fp32 would not be fp32 in vision towers, a judge's included
    return device


def _initialise(device: torch.device, deadline: timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if config_checks.launched(os.environ) > 1:
        dist.init_process_group(backend, init_method="env://", timeout=deadline)
    else:  # alone: the store lives in this process, no port is taken
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=deadline)


def _peers(stage: int, pipeline: int, replica: int, replicas: int, deadline: timedelta) -> tuple[ProcessGroup, ProcessGroup, list[int]]:
    """gloo groups of this replica's ranks and of its first stage's. megatron numbers ranks tensor first, then context,
    then data, then pipeline; a stage of a replica has `stage` of them, in a row."""
    every = []
    for d in range(replicas):  # every rank takes part in making every group
        ranks = [i + stage * (d + replicas * p) for p in range(pipeline) for i in range(stage)]
        every.append((dist.new_group(ranks, backend="gloo", timeout=deadline), dist.new_group(ranks[:stage], backend="gloo", timeout=deadline), ranks))
    return every[replica]
