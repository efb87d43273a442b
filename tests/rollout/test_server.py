"""The server engine: the same tokens as inline, transfers over gloo, a token on every route, and how it ends. One server for all."""
from __future__ import annotations

import socket
import time

import httpx
import psutil
import pytest

from sophiavl_fast.errors import EngineError, UserError
from sophiavl_fast.rollout.middleware import TOKEN_VARIABLE
from sophiavl_fast.rollout.server import pick_port
from tests.rollout import tiny
from tests.rollout.host import Host, open_engine
from tests.rollout.test_inline import HOT, T, generate, start

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def engine(folder, tmp_path_factory):
    engine = open_engine(folder, tmp_path_factory.mktemp("run"), engine="server", checksum=True, transfer_timeout_s=30)
    yield engine
    engine.close()
    assert not [p for p in psutil.Process().children(recursive=True) if p.name().startswith("VLLM")], "close left processes behind"


def family(engine) -> list[psutil.Process]:
    supervisor = psutil.Process(engine._server._process.pid)
    return [supervisor, *supervisor.children(recursive=True)]


def test_every_route_wants_the_token(engine):
    good = {"Authorization": f"Bearer {engine._server.token}"}
    with httpx.Client(base_url=engine._server.url, timeout=60) as client:
        routes = client.get("/openapi.json", headers=good).json()["paths"]
        assert {"/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weights", "/inference/v1/generate", "/health"} <= set(routes)
        assert len(routes) > 20
        for route in [*routes, "/docs", "/openapi.json", "/metrics", "/nowhere"]:
            for method in ("GET", "POST", "OPTIONS"):
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": engine._server.token}):
                    assert client.request(method, route, headers=headers).status_code == 401, (method, route, headers)


def test_the_token_is_on_no_command_line(engine):
    assert not [p for p in family(engine) if engine._server.token in " ".join(p.cmdline())]


def test_logprobs_equal_hugging_face(engine, prompts, model):
    groups = engine.generate(prompts, **HOT)
    assert tiny.worst_difference(model, groups, T) < 1e-4
    assert {v for g in groups for r in g.responses for v in r.weight_versions} == {0}


def test_the_same_tokens_as_inline(engine, prompts, folder, tmp_path):
    host = Host(folder, tmp_path)
    try:
        host.call(start)
        inline = host.call(generate, prompts, HOT)
    finally:
        host.close()
    for a, b in zip(engine.generate(prompts, **HOT), inline, strict=True):
        assert [(r.token_ids, r.seed, r.finish_reason, r.text) for r in a.responses] == [(r.token_ids, r.seed, r.finish_reason, r.text) for r in b.responses]
        assert max(abs(x - y) for r, q in zip(a.responses, b.responses) for x, y in zip(r.logprobs, q.logprobs)) < 1e-5


def test_new_weights_are_sampled_from_after_a_transfer(engine, prompts, folder, model):
    new = tiny.perturbed(folder, 1)
    times = engine.send(tiny.Weights(new), 3)
    assert times["bytes"] == sum(p.numel() * 4 for p in new.parameters())
    groups = engine.generate(prompts, **HOT)
    assert tiny.worst_difference(new, groups, T) < 1e-4 < 0.01 < tiny.worst_difference(model, groups, T)
    assert {v for g in groups for r in g.responses for v in r.weight_versions} == {3}
    engine.send(tiny.Weights(model), 4)
    assert tiny.worst_difference(model, engine.generate(prompts, **HOT), T) < 1e-4


def test_groups_are_announced_as_they_finish(engine, prompts):
    seen, progress = [], []
    groups = engine.generate(prompts, **HOT, on_group=seen.append, on_progress=lambda *a: progress.append(a))
    assert sorted(g.prompt.id for g in seen) == sorted(p.id for p in prompts) and [g.prompt.id for g in groups] == [p.id for p in prompts]
    assert progress[-1] == (16, 16, sum(len(r.token_ids) for g in groups for r in g.responses))


def test_a_taken_port_is_one_line():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match=rf"rollout\.port = {other.getsockname()[1]} cannot be had"):
            pick_port(other.getsockname()[1])


def test_a_found_server_is_trusted_after_a_transfer_only(engine, prompts, model, folder, tmp_path, monkeypatch):
    """Another run takes the server over: it must send first, and from then on the first run is refused by name."""
    found = {"engine": "server", "urls": [engine._server.url], "transfer_timeout_s": 30}
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(UserError, match=TOKEN_VARIABLE):
        open_engine(folder, tmp_path, **found)
    monkeypatch.setenv(TOKEN_VARIABLE, "wrong")
    with pytest.raises(EngineError, match="refused this run's token"):
        open_engine(folder, tmp_path, **found)
    monkeypatch.setenv(TOKEN_VARIABLE, engine._server.token)
    other = open_engine(folder, tmp_path, **found)
    with pytest.raises(EngineError, match="samples nothing before this run has sent"):
        other.generate(prompts, **HOT)
    new = tiny.perturbed(folder, 5)
    other.send(tiny.Weights(new), 9)
    assert tiny.worst_difference(new, other.generate(prompts, **HOT), T) < 1e-4
    other.close()
    with pytest.raises(EngineError, match="weights of another run"):
        engine.generate(prompts, **HOT)
    with pytest.raises(EngineError, match="serves another run now"):
        engine.send(tiny.Weights(model), 5)


def current_nonce(engine) -> str:
    """The nonce of the run that the server serves now."""
    reply = httpx.get(f"{engine._server.url}/weight_info", headers={"Authorization": f"Bearer {engine._server.token}"})
    return reply.json()["weight_version"].partition(":")[0]


def test_a_killed_server_is_named_at_once_and_leaves_nothing(engine, prompts, model):
    """Last: it ends the shared server. kill -9 of the API server only, as in an out-of-memory kill."""
    engine._transfer.broken, engine._nonce = "", current_nonce(engine)   # of the test before
    supervisor, api, *rest = family(engine)
    assert rest, "the engine core is a process of its own"
    began = time.monotonic()

    def kill(done, wanted, tokens):
        api.kill()

    with pytest.raises(EngineError, match=rf"rollout server {engine._server.url} .*generate"):
        for step in range(100):
            engine.generate(prompts, **HOT | {"step": step}, on_progress=kill)
    assert time.monotonic() - began < 60
    _, alive = psutil.wait_procs([supervisor, api, *rest], timeout=30)
    assert not alive
    with pytest.raises(EngineError, match="ended during weight transfer"):
        engine.send(tiny.Weights(model), 6)
