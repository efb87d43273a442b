"""A gloo group of its own between trainer and workers, beside whatever default group either has."""
from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch import Tensor


class Group:
    """Rank 0 is the trainer; `store` is where the members meet. Every operation ends by `timeout_s`.

    address: of this machine, as the others reach it. Left alone gloo takes the one that its name stands for, which on many machines is a loopback.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_s: float, address: str) -> None:
        self._store = store
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timedelta(seconds=timeout_s)
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("weights", store), rank, world_size, options)

    def broadcast(self, tensor: Tensor) -> None:
        """From rank 0 to all, in place; blocks. Raises RuntimeError when a member is gone or the time is out."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._gloo.broadcast([tensor], options).wait()  # type: ignore[attr-defined]


def open_store(host: str, port: int, world_size: int, timeout_s: float, *, master: bool) -> dist.TCPStore:
    """The meeting place; the master takes port 0 for a free one (`store.port`)."""
    return dist.TCPStore(host, port, world_size, is_master=master, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
