"""Two real engines; each process of one of them is killed or stopped in each phase: named within the deadline, its requests redone with the same
answers, the engine back with the current weights. Then the same where no restart is left: one error."""
from __future__ import annotations

import dataclasses
import functools
import logging
import os
import signal
import threading
import time

import httpx
import psutil
import pytest

from sophiavl_fast.errors import EngineError
from sophiavl_fast.rollout import transfer
from tests.rollout import tiny
from tests.rollout.host import open_engine
from tests.rollout.test_inline import HOT, T

pytestmark = [pytest.mark.engine, pytest.mark.kill]
DEADLINE_S = 25.0
CASES = [("generate", "engine worker", "KILL"), ("generate", "engine core", "KILL"), ("generate", "API server", "KILL"), ("generate", "supervisor", "KILL"),
         ("generate", "engine worker", "STOP"),
         ("generate", "API server", "STOP"), ("transfer", "engine worker", "KILL"), ("transfer", "API server", "KILL"), ("transfer", "engine worker", "STOP"),
         ("between", "engine worker", "KILL"), ("between", "API server", "STOP")]


@pytest.fixture(scope="module")
def pool(folder, tmp_path_factory):
    engine = open_engine(folder, tmp_path_factory.mktemp("pool"), engine="server", engines=2, max_restarts=100, checksum=True, sleep=True,
                         start_timeout_s=900.0, transfer_timeout_s=DEADLINE_S, request_timeout_s=DEADLINE_S)
    yield engine
    engine.close()
    assert not [p for p in psutil.Process().children(recursive=True) if "VLLM" in p.name()], "close left processes behind"


@pytest.fixture(scope="module")
def many(folder):
    return [tiny.prompt(folder, f"p{i}", f"{i}+{i}=?", [tiny.picture(i)] if i % 2 else []) for i in range(24)]


@pytest.fixture
def small_buckets(monkeypatch):
    monkeypatch.setattr(transfer, "buckets", functools.partial(transfer.buckets, limit=50_000))


def settle(engine) -> None:
    """Wait until every engine of the pool is back."""
    until = time.monotonic() + 900
    while not all(e.state == "ready" for e in engine._pool.engines):
        assert time.monotonic() < until
        engine.tend()
        time.sleep(0.5)


def strike(victim, role: str, how: str) -> int:
    """Signal the victim's process of that role; its pid."""
    pid = next(pid for pid, name in victim.server._family.roles.items() if name.startswith(role))
    os.kill(pid, getattr(signal, f"SIG{how}"))
    return pid


class Striking(tiny.Weights):
    """Weights of which the middle one strikes."""

    def __init__(self, model, deed) -> None:
        super().__init__(model)
        self.deed, self.passes = deed, 0

    def weights(self):
        self.passes += 1
        for i, pair in enumerate(self.named):
            if i == len(self.named) // 2 and self.passes == 1:
                self.deed()
            yield pair


def answers(groups) -> list:
    return [[r.token_ids for r in g.responses] for g in groups]


def phases_of(engine, model, many, phase: str, deed) -> list:
    """Transfer and generate once, with the deed in the phase; the answers."""
    struck = []
    once = lambda *_: struck or struck.append(deed())
    engine.send(Striking(model, once) if phase == "transfer" else tiny.Weights(model), 7)
    if phase == "between":
        once()
    groups = engine.generate(many, **HOT, on_progress=once if phase == "generate" else None)
    return groups, struck[0]


@pytest.mark.parametrize("phase, role, how", CASES, ids=["-".join(c).replace(" ", "_") for c in CASES])
def test_a_lost_engine_is_named_and_replaced(pool, many, model, folder, caplog, small_buckets, phase, role, how):
    caplog.set_level(logging.WARNING, "sophiavl_fast.rollout")
    settle(pool)
    new = tiny.perturbed(folder, CASES.index((phase, role, how)))
    pool.send(tiny.Weights(new), 6)
    expected = answers(pool.generate(many, **HOT))
    pool.counters()
    victim = pool._pool.engines[0]
    url, family = victim.url, [psutil.Process(pid) for pid in victim.server._family.roles]
    began = time.monotonic()
    groups, pid = phases_of(pool, new, many, phase, lambda: strike(victim, role, how))
    assert answers(groups) == expected
    assert time.monotonic() - began < 8 * DEADLINE_S, "deadlines do not add up for ever, on however busy a machine"
    found, late = pool.counters(), False
    if phase == "generate" and not found["restarts"]:   # it had answered everything before it fell: its next use finds out
        late = True
        assert answers(pool.generate(many, **HOT)) == expected
        found = pool.counters()
    assert found["restarts"] == 1 and found["engines"] == 2
    assert late or found["redone"] >= (phase == "generate" or (phase, how) == ("between", "STOP"))
    [line] = [r.getMessage() for r in caplog.records]
    assert f"rollout server {url} (pid " in line and f"{role} (pid {pid}) {'ended' if how == 'KILL' else 'stopped'}" in line
    assert {"generate": "generate", "transfer": "weight", "between": "generate"}[phase] in line and " WARNING " not in line
    settle(pool)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive and victim.url != ""
    [again] = [e for e in pool._pool.engines if e is victim]
    others = [e for e in pool._pool.engines if e is not victim]
    try:
        for e in others:
            e.state = "lost"
        groups = pool.generate(many, **HOT)      # by the one started anew alone
    finally:
        for e in others:
            e.state = "ready"
    assert answers(groups) == expected and {v for g in groups for r in g.responses for v in r.weight_versions} == {7}
    assert tiny.worst_difference(new, groups[:4], T) < 1e-4 and again.load == 0


def sleeping(engine) -> bool:
    """What vLLM itself says."""
    return httpx.get(f"{engine.url}/is_sleeping", headers={"Authorization": f"Bearer {engine.server.token}"}).json()["is_sleeping"]


def test_an_engine_lost_in_its_sleep_is_replaced_by_one_that_is_awake(pool, many, model):
    settle(pool)
    pool.send(tiny.Weights(model), 30)
    expected = answers(pool.generate(many, **HOT))
    pool.counters()
    pool.sleep()
    assert all(map(sleeping, pool._pool.engines))
    strike(pool._pool.engines[0], "engine worker", "KILL")
    pool.send(tiny.Weights(model), 31)       # to the other, which wakes
    assert answers(pool.generate(many, **HOT)) == expected
    settle(pool)
    assert not any(map(sleeping, pool._pool.engines)) and pool.counters()["restarts"] == 1
    groups = pool.generate(many, **HOT)
    assert answers(groups) == expected and {v for g in groups for r in g.responses for v in r.weight_versions} == {31}


def test_an_engine_that_is_being_started_anew_is_waited_for_and_sleeps_too(pool, many, model):
    """Or it would take its memory while the trainer has it."""
    settle(pool)
    pool.send(tiny.Weights(model), 32)
    expected = answers(pool.generate(many, **HOT))
    strike(pool._pool.engines[0], "API server", "KILL")
    pool.sleep()
    assert [e.state for e in pool._pool.engines] == ["up", "ready"] and all(map(sleeping, pool._pool.engines))
    pool.send(tiny.Weights(model), 33)
    assert [e.state for e in pool._pool.engines] == ["ready"] * 2 and not any(map(sleeping, pool._pool.engines))
    assert answers(pool.generate(many, **HOT)) == expected


def test_long_responses_do_not_hold_short_ones_up(pool, many, model):
    """The engine with a slow request in it is given fewer others."""
    settle(pool)
    slow, fast = pool._pool.engines
    slow.load += 5
    asked: list = []
    plain = pool._ask_engine

    async def noting(client, picked, prompt, sampling):
        asked.append(picked.engine)
        return await plain(client, picked, prompt, sampling)

    pool._ask_engine = noting
    try:
        pool.generate(many[:8], **HOT)
    finally:
        slow.load -= 5
        pool._ask_engine = plain
    assert asked[:5] == [fast] * 5 and slow in asked[5:] and slow.load == fast.load == 0


class Picture:
    """An image that takes long to encode: meanwhile the engine it was to be sent to is lost."""

    def __init__(self, image, deed) -> None:
        self._image, self._deed = image, deed

    def __getattr__(self, name):
        return getattr(self._image, name)

    def save(self, *arguments, **options) -> None:
        self._deed()
        self._image.save(*arguments, **options)


def test_an_engine_lost_by_another_thread_before_its_request_is_sent(pool, many, model):
    """As in a run ahead of the policy, whose main thread looks after the engines meanwhile."""
    settle(pool)
    pool.send(tiny.Weights(model), 40)
    expected = answers(pool.generate(many[1:2], **HOT))
    pool.counters()
    victim = min(pool._pool.engines, key=lambda e: e.load)      # the one that a first request is given

    def deed() -> None:
        if not struck:
            struck.append(strike(victim, "API server", "KILL"))
            while victim.state == "ready":
                time.sleep(0.05)

    struck: list[int] = []
    stop = threading.Event()
    main = threading.Thread(target=lambda: [pool._pool.check("the time between requests") for _ in iter(lambda: stop.wait(0.05), True)])
    main.start()
    try:
        groups = pool.generate([dataclasses.replace(many[1], images=[Picture(i, deed) for i in many[1].images])], **HOT)
    finally:
        stop.set()
        main.join()
    found = pool.counters()
    assert struck and answers(groups) == expected and found["restarts"] == found["redone"] == 1 and all(e.load == 0 for e in pool._pool.engines)


def test_an_engine_lost_by_another_thread_as_a_transfer_begins_costs_one_restart(pool, many, model):
    settle(pool)
    pool.counters()
    victim = pool._pool.engines[0]
    states: list[str] = []

    def lose() -> None:
        if not states:
            strike(victim, "API server", "KILL")
            while not victim.server.trouble():
                time.sleep(0.05)
            pool._pool.check("the time between requests")
            states.append(victim.state)

    lanes = pool._pool._lanes

    def losing(*arguments):
        found = lanes(*arguments)
        lose()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool._pool, "_lanes", losing)
        pool.send(tiny.Weights(model), 41)
        assert states == [victim.state] == ["starting"]
    settle(pool)
    assert pool.counters()["restarts"] == 1 and len(pool.generate(many[:4], **HOT)) == 4


def test_without_a_restart_left_the_error_is_one_line(pool, many, model, caplog):
    """Last: both engines are lost for good."""
    caplog.set_level(logging.WARNING, "sophiavl_fast.rollout")
    settle(pool)
    for engine in pool._pool.engines:
        engine.restarts = pool._pool._max_restarts
    first, second = pool._pool.engines
    strike(first, "engine worker", "KILL")
    assert len(pool.generate(many, **HOT)) == len(many)          # by the other
    pool.counters()
    with pytest.raises(EngineError, match=r"rollout server .* \(pid \d+\) .*generate.*engine worker \(pid \d+\) ended.*after 100 restarts") as caught:
        pool.generate(many, **HOT, on_progress=lambda *_: psutil.pid_exists(second.server._family.members[-1].pid) and strike(second, "engine worker", "KILL"))
    assert "\n" not in str(caught.value)
    assert sum("it is left out" in r.getMessage() for r in caplog.records) == 1, "of the first; the second's end is the error"
    with pytest.raises(EngineError, match="engine worker"):
        pool.send(tiny.Weights(model), 9)
