"""Trainer side of the gloo backend: one broadcast a tensor, to every worker of an engine."""
from __future__ import annotations

from sophiavl_fast.errors import EngineLost
from sophiavl_fast.rollout.transfer.control import Control
from sophiavl_fast.rollout.transfer.process_group import Group, open_store
from sophiavl_fast.rollout.transfer.source import Bucket, description
from sophiavl_fast.rollout.transfer.together import together


class GlooChannel:
    """A group of the trainer (rank 0) and one engine's workers, so that an engine that dies breaks no other's.

    host: the address of this machine that the engine can reach.
    """

    def __init__(self, control: Control, host: str, timeout_s: float) -> None:
        self._control, self._timeout_s = control, timeout_s
        world_size = 1 + control.workers()
        store = open_store(host, 0, world_size, timeout_s, master=True)
        info = {"host": host, "port": store.port, "world_size": world_size, "rank_offset": 1, "timeout_s": timeout_s}
        self._group: Group | None = together(lambda: Group(store, 0, world_size, timeout_s, host), lambda: control.init_transfer(info), control,
                               phase="weight transfer (set-up)", timeout_s=timeout_s)

    def convert(self, bucket: Bucket) -> Bucket:
        return [(name, tensor.cpu()) for name, tensor in bucket]

    def send(self, bucket: Bucket) -> None:
        group = self._group
        if group is None:   # closed by the thread that replaces the engine
            raise EngineLost(f"{self._control.name} was given up before the weight transfer (send)")

        def broadcast() -> None:
            for _, tensor in bucket:
                group.broadcast(tensor)

        together(broadcast, lambda: self._control.update(description(bucket)), self._control,
                 phase="weight transfer (send)", timeout_s=self._timeout_s)

    def committed(self) -> None:
        pass

    def close(self) -> None:
        self._group = None
