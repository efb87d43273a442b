"""Weight transfer: one pass over the trainer's weights, through vLLM's own API, checked by name and by bits.

Order: begin the record, pause, start, buckets, end the record and compare, finish, reset three caches, resume. An engine that sleeps
(`rollout.sleep`) has its weights woken before all that, its key-value cache before it resumes. Whatever goes wrong after the start
leaves an engine with some old and some new weights: it is never used again.

Engines are written to side by side, each over a channel of its own: one that is lost on the way leaves the others whole. While a bucket
travels the next one is gathered, so that two are held at most.
Weights that never change (a frozen vision tower) travel once, to each engine that has not had them in this run.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from sophiavl_fast.errors import EngineError, EngineLost
from sophiavl_fast.rollout.transfer.checksum import checksum
from sophiavl_fast.rollout.transfer.control import Channel, Control
from sophiavl_fast.rollout.transfer.source import Bucket, buckets
from sophiavl_fast.types import WeightSource

PHASES = ("gather_s", "convert_s", "send_s", "load_s", "reset_s")
MAX_ENGINES = 64


@dataclass(eq=False)
class Lane:
    """The way to one engine, and what it has had."""

    control: Control
    channel: Channel
    complete: bool = False
    """It has had every weight in this run, so that frozen ones need not travel again."""
    known: set[str] = field(default_factory=set)
    """Names that it has."""
    asleep: bool = False

    def sleep(self) -> None:
        if not self.asleep:
            self.asleep = True   # also where it fails half-way
            self.control.sleep()

    def wake(self) -> None:
        """Wholly, with the weights it fell asleep with."""
        self.wake_weights()
        self.wake_cache()

    def wake_weights(self) -> None:
        if self.asleep:
            self.control.wake("weights")

    def wake_cache(self) -> None:
        if self.asleep:
            self.control.wake("kv_cache")
            self.asleep = False


class Transfer:
    """Sends weights to engines. nonce: this run's; checksums: compare every tensor's bits.

    in_flight: swap the weights under requests in flight instead of waiting for their end. overlap: gather a bucket while the one
    before it travels; not where the engine shares this process.
    """

    def __init__(self, *, nonce: str, checksums: bool, in_flight: bool = False, overlap: bool = True) -> None:
        self.nonce, self.checksums, self.in_flight, self.overlap = nonce, checksums, in_flight, overlap
        self.broken = ""
        self._threads, self._courier = ThreadPoolExecutor(MAX_ENGINES, "transfer"), ThreadPoolExecutor(1, "courier")

    def send(self, lanes: Sequence[Lane], source: WeightSource, version: int) -> tuple[dict[str, float], dict[Lane, EngineLost]]:
        """The weights of `source` into the engines; seconds by phase and `bytes` (to each), and the engines lost on the way.

        The source is gone through to its end even where every engine was lost: peers take part in it.
        Raises EngineError for what another engine would do again: a name missing or unknown, bits that changed.
        """
        self.refuse_broken()
        try:
            return _Pass(self, lanes, source).run(f"{self.nonce}:{version}")
        except BaseException as error:
            self.broken = f"weight transfer of version {version} failed: {error}"
            raise

    def sleep(self, lanes: Sequence[Lane]) -> dict[Lane, EngineLost]:
        """Give up what the engines hold of their GPUs, until the next `send` or `wake`; those lost on the way."""
        return {lane: lost for lane, lost in self.each(lanes, Lane.sleep) if lost}

    def wake(self, lanes: Sequence[Lane]) -> dict[Lane, EngineLost]:
        """Undo `sleep` without new weights; those lost on the way."""
        return {lane: lost for lane, lost in self.each(lanes, Lane.wake) if lost}

    def refuse_broken(self) -> None:
        """Raise EngineError when an earlier transfer left an engine in between."""
        if self.broken:
            raise EngineError(f"rollout: the engine is unusable since {self.broken}")

    def close(self) -> None:
        for threads in (self._threads, self._courier):
            threads.shutdown(wait=False, cancel_futures=True)

    def dispatch(self, call: Callable[[], Any]) -> Future[float]:
        """Begin the call beside the caller's thread, or do it at once without `overlap`; its seconds."""
        def timed() -> float:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began

        if self.overlap:
            return self._courier.submit(timed)
        done: Future[float] = Future()
        done.set_result(timed())
        return done

    def each(self, lanes: Sequence[Lane], call: Callable[[Lane], Any]) -> Iterator[tuple[Lane, Any]]:
        """Each lane with what `call` returned for it, or the EngineLost it raised; side by side."""
        def guarded(lane: Lane) -> Any:
            try:
                return call(lane)
            except EngineLost as lost:
                return lost

        yield from zip(lanes, [guarded(lanes[0])] if len(lanes) == 1 else self._threads.map(guarded, lanes))


class _Pass:
    """One transfer under way."""

    def __init__(self, transfer: Transfer, lanes: Sequence[Lane], source: WeightSource) -> None:
        self.transfer, self.lanes, self.source = transfer, list(lanes), source
        self.lost: dict[Lane, EngineLost] = {}
        self.sums: dict[str, str] = {}
        self.times = dict.fromkeys((*PHASES, "bytes"), 0.0)
        self._under_way: Future[float] | None = None
        self._clock = time.perf_counter()

    def run(self, label: str) -> tuple[dict[str, float], dict[Lane, EngineLost]]:
        in_flight, frozen = self.transfer.in_flight, sorted(getattr(self.source, "frozen", ()))
        kept = frozen if all(lane.complete for lane in self.lanes) else []
        if any(lane.asleep for lane in self.lanes):
            self._all(Lane.wake_weights)
            self.times["wake_s"] = 0.0
            self._lap("wake_s")
        # refused by an engine that serves another run by now, which must not be left paused
        self._all(lambda lane: lane.control.rpc("sophia_begin", self.transfer.nonce, self.transfer.checksums, kept))
        self._all(lambda lane: lane.control.pause(keep=in_flight))
        self._all(lambda lane: lane.control.start())
        self._lap("load_s")
        for bucket in buckets(self.source, trained_only=bool(kept)):
            self._lap("gather_s")
            self._bucket(bucket)
        self._arrived()
        self._compare()
        self._all(lambda lane: lane.control.finish(label))
        for lane in self.lanes:
            lane.channel.committed()
            lane.complete = True
        self._lap("load_s")
        self._all(lambda lane: lane.control.reset_caches(in_flight=in_flight))
        self._lap("reset_s")
        self._all(Lane.wake_cache)   # only now, so that weights and cache are never there beside what the transfer takes
        if "wake_s" in self.times:
            self._lap("wake_s")
        self._all(lambda lane: lane.control.resume())
        self._lap("reset_s")
        return self.times, self.lost

    def _bucket(self, bucket: Bucket) -> None:
        """Send it off once the one before has arrived."""
        channels = [lane.channel for lane in self.lanes]   # of which the one under way may lose some
        travelling = channels[0].convert(bucket) if channels else []
        if self.transfer.checksums:
            self.sums.update((name, checksum(tensor)) for name, tensor in bucket)
        self._lap("convert_s")
        self._arrived()
        self._refuse_unknown(bucket)
        if self.lanes:
            self._under_way = self.transfer.dispatch(lambda: self._all(lambda lane: lane.channel.send(travelling)))
            self.times["bytes"] += sum(t.numel() * t.element_size() for _, t in bucket)
        self._lap("send_s")

    def _arrived(self) -> None:
        """Wait for the bucket under way. send_s and load_s are what is waited for; what gathering hides of them is hidden_s."""
        if self._under_way:
            began = time.perf_counter()
            busy, self._under_way = self._under_way.result(), None
            if self.transfer.overlap:
                self.times["hidden_s"] = self.times.get("hidden_s", 0.0) + max(0.0, busy - (time.perf_counter() - began))
        self._lap("send_s")

    def _refuse_unknown(self, bucket: Bucket) -> None:
        """Before any byte moves: an engine that meets a name it does not know leaves the others waiting."""
        names = [name for name, _ in bucket]
        if all(lane.known.issuperset(names) for lane in self.lanes):
            return
        for lane, workers in self._all(lambda lane: lane.control.rpc("sophia_unknown", names)):
            if unknown := sorted({name for answer in workers for name in answer}):
                raise EngineError(f"weight transfer to {lane.control.name}: {len(unknown)} names it does not have: {_some(unknown)}")
            lane.known.update(names)

    def _compare(self) -> None:
        """The engine's own record against what was sent: names, parameters written, checksums."""
        loading = 0.0
        for lane, workers in self._all(lambda lane: lane.control.rpc("sophia_end")):
            to = f"weight transfer to {lane.control.name}"
            for record in workers:
                loading = max(loading, record["load_s"])
                if record["missing"]:
                    raise EngineError(f"{to}: {len(record['missing'])} tensors were never sent: {_some(record['missing'])}")
                if record["unfilled"]:
                    raise EngineError(f"{to}: {len(record['unfilled'])} of its parameters kept their old values: {_some(record['unfilled'])}")
                if wrong := sorted(n for n, value in self.sums.items() if record["checksums"].get(n) != value):
                    raise EngineError(f"{to}: {len(wrong)} tensors arrived changed: {_some(wrong)}")
        loading = min(loading, self.times["send_s"])   # tensors are loaded as they arrive, within what was timed as sending
        self.times["send_s"] -= loading
        self.times["load_s"] += loading

    def _all(self, call: Callable[[Lane], Any]) -> list[tuple[Lane, Any]]:
        """Call for every engine that is still there; who is lost now is left out from here on."""
        found = list(self.transfer.each(self.lanes, call)) if self.lanes else []
        self.lost |= {lane: answer for lane, answer in found if isinstance(answer, EngineLost)}
        self.lanes = [lane for lane in self.lanes if lane not in self.lost]
        return [(lane, answer) for lane, answer in found if lane not in self.lost]

    def _lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.times[phase] += now - self._clock
        self._clock = now


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
