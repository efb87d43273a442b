"""Engine side of our two weight transfer backends, in vLLM's own API (vllm.distributed.weight_transfer).

`inproc`: engine and trainer share a process, so tensors are handed over as they are. `gloo`: one broadcast a tensor
from the trainer to every worker, for CPUs. Both load through vLLM's layerwise reload, which redoes what loading did
once (CPU kernels repack linear weights); writing to parameters directly would leave the repacked copies stale.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from sophiavl_fast.rollout.machine import address_towards
from sophiavl_fast.rollout.transfer.process_group import Group, open_store


class _Reload(WeightTransferEngine):
    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)


@dataclass
class InprocInit(WeightTransferInitInfo):
    """Nothing to agree on inside one process."""


@dataclass
class InprocUpdate(WeightTransferUpdateInfo):
    weights: list[tuple[str, Tensor]]


class InprocReceiver(_Reload):
    init_info_cls, update_info_cls = InprocInit, InprocUpdate

    def init_transfer_engine(self, init_info: InprocInit) -> None:
        pass

    def receive_weights(self, update_info: InprocUpdate) -> None:
        self.model.load_weights(iter(update_info.weights))  # type: ignore[operator]

    def shutdown(self) -> None:
        pass


@dataclass
class GlooInit(WeightTransferInitInfo):
    host: str
    port: int
    world_size: int
    rank_offset: int
    timeout_s: float


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooReceiver(_Reload):
    init_info_cls, update_info_cls = GlooInit, GlooUpdate
    group: Group | None = None

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        config: Any = self.parallel_config
        rank = init_info.rank_offset + config.data_parallel_index * config.world_size + config.rank
        store = open_store(init_info.host, init_info.port, init_info.world_size, init_info.timeout_s, master=False)
        self.group = Group(store, rank, init_info.world_size, init_info.timeout_s, address_towards(init_info.host, init_info.port))

    def receive_weights(self, update_info: GlooUpdate) -> None:
        group = self.group

        def arriving():
            for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
                group.broadcast(tensor)
                yield name, tensor

        self.model.load_weights(arriving())  # type: ignore[operator]

    def shutdown(self) -> None:
        self.group = None


def register() -> None:
    """Make both known to vLLM in this process; once is enough."""
    known = WeightTransferEngineFactory._registry
    for name, receiver in (("inproc", InprocReceiver), ("gloo", GlooReceiver)):
        if name not in known:
            WeightTransferEngineFactory.register_engine(name, receiver)
