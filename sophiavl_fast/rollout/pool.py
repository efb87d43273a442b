"""The rollout engines of one replica: which of them may sample, and what happens to one that is lost.

A spawned engine that ends or goes silent is ended for good, started again at most `rollout.max_restarts` times, and given the
current weights under the run's nonce before it samples; whoever held a request of it asks another. A server found running
(`rollout.urls`) is nobody's to restart: it is left out from then on. The run ends when no engine is left.
"""
from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sophiavl_fast.errors import EngineError, EngineLost
from sophiavl_fast.rollout.server import Server
from sophiavl_fast.rollout.transfer import Lane, Transfer
from sophiavl_fast.rollout.transfer.control import Channel
from sophiavl_fast.rollout.transfer.http import HttpControl
from sophiavl_fast.types import WeightSource

log = logging.getLogger(__name__)
WAIT_S = 0.2


@dataclass(eq=False)
class Engine:
    """One engine. life: how often it was lost, so that news of an earlier life is told from news of this one."""

    index: int
    url: str = ""
    server: Server | None = None
    lane: Lane | None = None
    state: Literal["starting", "up", "ready", "lost"] = "starting"
    """up: it answers, but has not this run's weights; lost: for good."""
    load: int = 0
    life: int = 0
    restarts: int = 0
    why: EngineLost | None = None

    @property
    def name(self) -> str:
        return self.server.name if self.server else f"rollout server {self.url}"

    @property
    def control(self) -> HttpControl:
        assert self.lane and isinstance(self.lane.control, HttpControl)
        return self.lane.control


class Picked(NamedTuple):
    """An engine to be asked, and the way to it in the life it was picked in: whatever becomes of the engine meanwhile."""

    engine: Engine
    life: int
    control: HttpControl


class Pool:
    """start(index): spawns the server of that number. control, channel: the ways to an engine that answers. nonce: the run's.

    compare: raises UserError for an engine found running that holds another model.
    """

    def __init__(self, count: int, urls: list[str], *, start: Callable[[int], Server], control: Callable[[Engine], HttpControl],
                 channel: Callable[[HttpControl], Channel], compare: Callable[[HttpControl], None], nonce: str, banned_ids: list[int], max_restarts: int,
                 start_timeout_s: float) -> None:
        self.engines = [Engine(i, url, state="up") for i, url in enumerate(urls)] or [Engine(i) for i in range(count)]
        self.restarts = self.redone = 0
        self._start, self._control, self._channel, self._compare, self._nonce, self._banned_ids = start, control, channel, compare, nonce, banned_ids
        self._max_restarts, self._start_timeout_s = max_restarts, start_timeout_s
        self._source: WeightSource | None = None
        self._version = 0
        self._closed = False
        self._lock = threading.RLock()

    def open(self, on_wait: Callable[[float], None] | None = None) -> None:
        """Start every engine, side by side, and reach it. An engine that does not start the first time is an error."""
        for engine in self.engines:
            if engine.state == "starting":
                engine.server = self._start(engine.index)
        for engine in self.engines:
            if engine.server:
                engine.server.wait_ready(self._start_timeout_s, on_wait)
                engine.url, engine.state = engine.server.url, "up"
            else:
                self._control(engine).wait_ready(self._start_timeout_s, on_wait)
            self._connect(engine, engine.life)

    def pick(self) -> Picked | None:
        """The least loaded engine that may sample. Raises EngineError where none can any more."""
        with self._lock:
            self.refuse_closed()
            ready = [e for e in self.engines if e.state == "ready"]
            if ready:
                engine = min(ready, key=lambda e: e.load)
                return Picked(engine, engine.life, engine.control)
            self.refuse_hopeless()
        return None

    def refuse_closed(self) -> None:
        """Raise EngineError once the pool is closed: a run that ends early leaves requests in flight behind, and nobody is there to answer them."""
        if self._closed:
            raise EngineError("the rollout engines are closed")

    def refuse_hopeless(self) -> None:
        """Raise EngineError where no engine samples and none is being started, or where all await weights that nobody has sent."""
        found = {e.state for e in self.engines}
        if found == {"lost"}:
            raise next(e.why for e in self.engines if e.why)
        if self._source is None and found <= {"up", "lost"}:
            raise EngineError(f"{self.engines[0].name} was found running: it samples nothing before this run has sent its weights")

    def lose(self, engine: Engine, life: int, why: EngineLost) -> None:
        """The engine failed in that life: leave it out, and start it again where it may be."""
        with self._lock:
            if engine.life != life or engine.state == "lost" or self._closed:
                return
            lane, engine.lane = engine.lane, None
            engine.life, engine.load, engine.why = life + 1, 0, why
            again = engine.server is not None and engine.restarts < self._max_restarts
            engine.state = "starting" if again else "lost"
            if again:
                engine.restarts += 1
                self.restarts += 1
            else:
                if any(e.state != "lost" for e in self.engines):      # else this is what the run ends with
                    log.warning("%s; it is left out from here on", _line(why))
                engine.why = EngineLost(f"{_line(why)[:2000]}" + (f" (after {engine.restarts} restarts)" if engine.restarts else ""))
        if again:
            log.warning("%s; restart %d of %d", _line(why), engine.restarts, self._max_restarts)
        threading.Thread(target=self._revive if again else self._end, args=(engine, lane), daemon=True).start()

    def check(self, phase: str) -> None:
        """Leave out engines whose processes have ended meanwhile."""
        for engine in self.engines:
            life = engine.life
            if engine.state in ("up", "ready") and engine.server:
                try:
                    engine.server.refuse_dead(phase)
                except EngineLost as why:
                    self.lose(engine, life, why)

    def tend(self, transfer: Transfer) -> None:
        """Give the current weights to engines that answer again. In the thread and at a time at which the source may be read."""
        if self._source is not None and any(e.state == "up" for e in self.engines):
            self._send(transfer, lambda e: e.state == "up")

    def send(self, transfer: Transfer, source: WeightSource, version: int) -> dict[str, float]:
        """New weights to every engine there is; returns when at least one has them. Raises EngineError when none is left."""
        self._source, self._version = source, version
        self.check("weight transfer (before its start)")
        while True:
            if times := self._send(transfer, _answers):
                return times
            while not any(_answers(e) for e in self.engines):
                self.refuse_hopeless()
                time.sleep(WAIT_S)

    def sleep(self, transfer: Transfer) -> None:
        """Send every engine to sleep; one that is being started anew is waited for, since it would take its memory in the midst of what needs it.
        Raises EngineError when none is left."""
        while not all(e.state == "lost" or (e.lane and e.lane.asleep) for e in self.engines):
            self._told(transfer.sleep, _answers)
            while any(e.state == "starting" for e in self.engines):
                time.sleep(WAIT_S)
        if all(e.state == "lost" for e in self.engines):
            self.refuse_hopeless()

    def wake(self, transfer: Transfer) -> None:
        """Undo `sleep` without new weights."""
        self._told(transfer.wake, lambda e: _answers(e) and e.lane is not None and e.lane.asleep)

    def carry(self, picked: Picked, requests: int) -> None:
        """Note that the engine has so many more requests to answer in that life, or fewer; from any thread."""
        with self._lock:
            if picked.engine.life == picked.life:
                picked.engine.load += requests

    def redo(self) -> None:
        """Count a request that is asked again."""
        with self._lock:
            self.redone += 1

    def counters(self) -> dict[str, float]:
        """Restarts and redone requests since the last call, and engines that are not lost."""
        with self._lock:
            found = {"restarts": float(self.restarts), "redone": float(self.redone), "engines": float(sum(e.state != "lost" for e in self.engines))}
            self.restarts = self.redone = 0
        return found

    def close(self) -> None:
        with self._lock:
            self._closed = True
        for engine in self.engines:
            if engine.lane:
                close(engine.lane)
            if engine.server:
                engine.server.close()

    def _send(self, transfer: Transfer, wanted: Callable[[Engine], bool]) -> dict[str, float]:
        """The source's weights to these engines; {} where none has them now."""
        lives, lanes = self._lanes(wanted)
        lanes = {lane: e for lane, e in lanes.items() if self._mark(e, lives[e], "up")}     # half old, half new until the end
        if not lanes:
            return {}
        assert self._source is not None
        times, lost = transfer.send(list(lanes), self._source, self._version)
        for lane, engine in lanes.items():
            if lane in lost:
                self.lose(engine, lives[engine], lost[lane])
            else:
                self._mark(engine, lives[engine], "ready")
        return times if len(lost) < len(lanes) else {}

    def _mark(self, engine: Engine, life: int, state: Literal["up", "ready"]) -> bool:
        """Give the engine this state; False where it was lost since, in any thread, and keeps the state of its next life."""
        with self._lock:
            if engine.life == life:
                engine.state = state
            return engine.life == life

    def _told(self, call: Callable[[list[Lane]], dict[Lane, EngineLost]], wanted: Callable[[Engine], bool]) -> None:
        """Do it with these engines' lanes, and lose those that it loses."""
        lives, lanes = self._lanes(wanted)
        for lane, why in call(list(lanes)).items() if lanes else ():
            self.lose(lanes[lane], lives[lanes[lane]], why)

    def _lanes(self, wanted: Callable[[Engine], bool]) -> tuple[dict[Engine, int], dict[Lane, Engine]]:
        """These engines' lives, and the ways to those of them that can be reached."""
        with self._lock:
            lives = {e: e.life for e in self.engines if wanted(e)}
        for engine, life in lives.items():
            try:
                if engine.lane is None:
                    self._connect(engine, life)
            except EngineLost as why:
                self.lose(engine, life, why)
        with self._lock:
            return lives, {e.lane: e for e, life in lives.items() if e.lane and e.life == life}

    def _connect(self, engine: Engine, life: int) -> None:
        """Claim the engine for this run and open the way for weights. A spawned one holds version 0, model.path's."""
        control = self._control(engine)
        if not engine.server:
            self._compare(control)
        control.rpc("sophia_claim", self._nonce, self._banned_ids)
        if engine.server:
            control.label(f"{self._nonce}:0")
        lane = Lane(control, self._channel(control))
        with self._lock:
            if engine.life == life:
                engine.lane, engine.state = lane, "ready" if engine.server and self._source is None else "up"
                return
        close(lane)

    def _revive(self, engine: Engine, lane: Lane | None) -> None:
        """In a thread of its own: end what is left of the old server, start another."""
        life = engine.life
        self._end(engine, lane)
        try:
            with self._lock:
                if self._closed:
                    return
                engine.server = self._start(engine.index)
            engine.server.wait_ready(self._start_timeout_s)
            engine.url = engine.server.url
            if self._source is None:
                self._connect(engine, life)
            else:
                self._mark(engine, life, "up")
        except Exception as error:
            self.lose(engine, life, error if isinstance(error, EngineLost) else EngineLost(f"{engine.name} did not start again: {error}"))

    def _end(self, engine: Engine, lane: Lane | None) -> None:
        if engine.server:
            engine.server.close()
        if lane:
            close(lane)


def close(lane: Lane) -> None:
    """Let go of an engine."""
    lane.channel.close()
    if isinstance(lane.control, HttpControl):
        lane.control.close()


def _answers(engine: Engine) -> bool:
    return engine.state in ("up", "ready")


def _line(error: Exception) -> str:
    """The message without the log that it may quote."""
    return str(error).partition("; last lines of")[0]
