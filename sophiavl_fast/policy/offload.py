"""Optimizer state and gradients out of the way while nobody needs them (`policy.offload_optimizer`).

Between two updates the engines sample, the reference answers and weights travel; AdamW's moments (and under bf16 the fp32 weights) wait
on the CPU meanwhile, and the gradients' buffers, which every update begins by zeroing, are given back. Who touches either meanwhile fails:
nothing is left in their place. On a CPU the state only changes places, which is enough to show that it comes back to the bit.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Offload:
    """`rest` sends away what `wake` brings back; both may be called twice."""

    def __init__(self, optimizer: Any, wrapped: Any, device: torch.device) -> None:
        self._optimizer, self._buffers, self._device = optimizer, wrapped.buffers, device
        self._state: list[tuple[Tensor, str, Tensor]] = []   # (main weights, key in their state or "" for themselves, what lies on the CPU)
        self._sizes: list[int] = []
        self.resting = False

    def rest(self) -> None:
        """Moments and own fp32 weights to the CPU, the gradients' buffers freed."""
        if self.resting:
            return
        for main, key, tensor in list(self._held()):
            away = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._device.type == "cuda").copy_(tensor)
            self._state.append((main, key, away))
            self._put(main, key, torch.empty(0, dtype=tensor.dtype, device=self._device))
        storages = [buffer.grad_data.untyped_storage() for buffer in self._buffers]
        self._sizes = [storage.nbytes() for storage in storages]
        for storage in storages:
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()   # the engine beside us is another process, or another allocator
        self.resting = True

    def wake(self) -> None:
        """Everything back in its place; the gradients' buffers hold anything until they are zeroed."""
        if not self.resting:
            return
        for main, key, away in self._state:
            self._put(main, key, away.to(self._device, copy=True))
        self._state.clear()
        for buffer, size in zip(self._buffers, self._sizes, strict=True):
            buffer.grad_data.untyped_storage().resize_(size)
        self.resting = False

    def _held(self) -> Iterator[tuple[Tensor, str, Tensor]]:
        """Tensors of the optimizer that are its own: fp32 main weights under bf16, and moments. Main weights in fp32 are views of the policy's."""
        for part in self._optimizer.chained_optimizers:
            own = {id(p) for group in getattr(part, "shard_fp32_from_float16_groups", []) for p in group}
            for group in part.optimizer.param_groups:
                for main in group["params"]:
                    if id(main) in own:
                        yield main, "", main.data
                    for key, value in part.optimizer.state.get(main, {}).items():
                        if isinstance(value, Tensor) and value.dim():
                            yield main, key, value

    def _put(self, main: Tensor, key: str, value: Tensor) -> None:
        if not key:
            main.data = value
            return
        for part in self._optimizer.chained_optimizers:
            if main in part.optimizer.state:
                part.optimizer.state[main][key] = value
