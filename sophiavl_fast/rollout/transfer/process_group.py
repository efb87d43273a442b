"""A gloo group of its own between trainer and workers, beside whatever default group either has."""
from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch import Tensor


class Group:
    """Rank 0 is the trainer and hosts the store. Every operation ends by `timeout_s`."""

    def __init__(self, host: str, port: int, rank: int, world_size: int, timeout_s: float) -> None:
        timeout = timedelta(seconds=timeout_s)
        self.store = dist.TCPStore(host, port, world_size, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("weights", self.store), rank, world_size, timeout)

    def broadcast(self, tensor: Tensor) -> None:
        """From rank 0 to all, in place; blocks. Raises RuntimeError when a member is gone or the time is out."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._gloo.broadcast([tensor], options).wait()
