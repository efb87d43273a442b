"""What a weight transfer asks of an engine, whichever way the engine is reached."""
from __future__ import annotations

from typing import Any, Literal, Protocol

from sophiavl_fast.rollout.transfer.source import Bucket

Part = Literal["weights", "kv_cache"]   # vLLM's names of what sleeps


class Control(Protocol):
    """One engine's control plane. Every call has a deadline and raises EngineError naming engine and phase (EngineLost where it is gone or silent)."""

    name: str
    """How errors call it: "inline engine", or the server's address."""

    def rpc(self, method: str, *args: Any) -> list[Any]:
        """Call an EngineExtension method on every worker; one JSON-able result a worker."""
        ...

    def init_transfer(self, info: dict[str, Any]) -> None: ...

    def start(self) -> None: ...

    def update(self, info: dict[str, Any]) -> None: ...

    def finish(self, label: str) -> None:
        """Commit, and label what is sampled from now on (`<nonce>:<version>`)."""
        ...

    def reset_caches(self, *, in_flight: bool) -> None:
        """Forget prefixes, processed images and encoder outputs: all three hold what the old weights computed.

        in_flight: requests that a pause kept lose their cache too, and compute it again with the new weights.
        """
        ...

    def pause(self, *, keep: bool) -> None:
        """Hold new requests back; let those in flight end, or keep them where they are."""
        ...

    def resume(self) -> None: ...

    def sleep(self) -> None:
        """Weights to host memory, key-value cache given up (level 1); nothing is sampled until both are awake. No request may be in flight."""
        ...

    def wake(self, part: Part) -> None:
        """Bring one of the two back: the weights as they were, then an empty cache. With the second it samples again."""
        ...

    def workers(self) -> int:
        """Worker processes of the engine (tensor x data parallel)."""
        ...

    def diagnosis(self) -> str:
        """What is known of a failure beside the failed call, to be appended to its message; "" for nothing."""
        ...


class Channel(Protocol):
    """A backend's trainer side, to one engine."""

    def convert(self, bucket: Bucket) -> Bucket:
        """The tensors as they travel, such as on the host."""
        ...

    def send(self, bucket: Bucket) -> None:
        """Deliver the tensors to every worker and have them loaded before returning."""
        ...

    def committed(self) -> None:
        """The engine has finished the update: what was shared with it may go."""
        ...

    def close(self) -> None: ...
