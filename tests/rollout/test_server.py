"""The server engine: the same tokens as inline, transfers over gloo, a token on every route, and how it ends. One server for all."""
from __future__ import annotations

import functools
import shutil
import socket
import threading
import time
import weakref

import httpx
import psutil
import pytest
import torch

from sophiavl_fast.errors import EngineError, UserError
from sophiavl_fast.rollout import transfer
from sophiavl_fast.rollout.middleware import TOKEN_VARIABLE
from sophiavl_fast.rollout.server import lowest_handed_out, pick_port
from tests.rollout import tiny
from tests.rollout.host import Host, open_engine
from tests.rollout.test_inline import HOT, T, generate, start

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def engine(folder, tmp_path_factory):
    engine = open_engine(folder, tmp_path_factory.mktemp("run"), engine="server", checksum=True, transfer_timeout_s=60, max_restarts=0, start_timeout_s=900.0,
                         sleep=True)
    yield engine
    engine.close()
    assert not [p for p in psutil.Process().children(recursive=True) if p.name().startswith("VLLM")], "close left processes behind"


def server(engine):
    return engine._pool.engines[0].server


def family(engine) -> list[psutil.Process]:
    supervisor = psutil.Process(server(engine)._process.pid)
    return [supervisor, *supervisor.children(recursive=True)]


def test_every_route_wants_the_token(engine):
    good = {"Authorization": f"Bearer {server(engine).token}"}
    with httpx.Client(base_url=server(engine).url, timeout=60) as client:
        routes = client.get("/openapi.json", headers=good).json()["paths"]
        assert {"/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weights", "/sleep", "/wake_up", "/is_sleeping", "/inference/v1/generate",
                "/health"} <= set(routes)
        assert len(routes) > 20
        for route in [*routes, "/docs", "/openapi.json", "/metrics", "/nowhere"]:
            for method in ("GET", "POST", "OPTIONS"):
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": server(engine).token}):
                    assert client.request(method, route, headers=headers).status_code == 401, (method, route, headers)


def test_the_token_is_on_no_command_line(engine):
    assert not [p for p in family(engine) if server(engine).token in " ".join(p.cmdline())]


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


@pytest.fixture
def asked(engine):
    """Every control call that really goes out, as path and query."""
    calls: list[str] = []
    note = lambda request: calls.append(f"{request.url.path}{f'?{request.url.query.decode()}' if request.url.query else ''}")
    hooks = engine._pool.engines[0].control._client.event_hooks
    engine._pool.engines[0].control._client.event_hooks = {"request": [note]}
    yield calls
    engine._pool.engines[0].control._client.event_hooks = hooks


def asleep(engine) -> bool:
    """What vLLM itself says."""
    with httpx.Client(base_url=server(engine).url, headers={"Authorization": f"Bearer {server(engine).token}"}) as client:
        return client.get("/is_sleeping").json()["is_sleeping"]


def test_a_sleeping_server_wakes_for_new_weights_part_by_part(engine, prompts, folder, model, asked):
    assert not asleep(engine)
    engine.sleep()
    engine.sleep()      # twice is once
    assert asleep(engine) and asked == ["/sleep?level=1"]
    asked.clear()
    new = tiny.perturbed(folder, 2)
    times = engine.send(tiny.Weights(new), 11)
    order = [asked.index(call) for call in ("/wake_up?tags=weights", "/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_encoder_cache",
                                            "/wake_up?tags=kv_cache", "/is_sleeping", "/resume")]
    assert order == sorted(order) and asked.count("/wake_up?tags=weights") == asked.count("/wake_up?tags=kv_cache") == 1
    assert not asleep(engine) and times["wake_s"] > 0
    assert tiny.worst_difference(new, engine.generate(prompts, **HOT), T) < 1e-4
    asked.clear()
    assert "wake_s" not in engine.send(tiny.Weights(model), 12) and not [call for call in asked if "wake" in call]


def test_a_sleeping_server_wakes_to_generate(engine, prompts, asked):
    """With the weights and the version that it fell asleep with."""
    expected = engine.generate(prompts, **HOT)
    engine.sleep()
    groups = engine.generate(prompts, **HOT)
    for woken, before in zip((r for g in groups for r in g.responses), (r for g in expected for r in g.responses), strict=True):
        assert (woken.token_ids, woken.weight_versions) == (before.token_ids, before.weight_versions)
        assert woken.logprobs == pytest.approx(before.logprobs, abs=1e-5)    # not to the bit: which requests meet in a batch is a matter of time
    assert not asleep(engine)
    assert asked == ["/sleep?level=1", "/wake_up?tags=weights", "/wake_up?tags=kv_cache", "/is_sleeping"]


class Fresh(tiny.Weights):
    """Copies of the weights, as gathering makes them: how many bytes of them live is counted at each; `asked` counts them, and the end as two.

    A copy is made once no more than `limit` bytes live with it, or never will: gloo's threads let go of the last tensor a moment after its end.
    """

    def __init__(self, model, limit: int) -> None:
        super().__init__(model)
        self.changed, self.asked, self.most, self.living, self.limit = threading.Condition(), 0, 0, 0, limit

    def weights(self):
        for name, tensor in self.named:
            self.ask(1)
            memory = tensor.numpy().copy()     # what lives exactly as long as the tensors that share it
            until = time.monotonic() + 5
            while self.living + memory.nbytes > self.limit >= self.most and time.monotonic() < until:
                time.sleep(0.01)
            self.living += memory.nbytes
            self.most = max(self.most, self.living)
            weakref.finalize(memory, self.forget, memory.nbytes)
            fresh = torch.from_numpy(memory)
            del memory
            yield name, fresh
            del fresh
        self.ask(2)

    def ask(self, count: int) -> None:
        with self.changed:
            self.asked += count
            self.changed.notify_all()

    def forget(self, size: int) -> None:
        self.living -= size


def test_a_bucket_is_gathered_while_the_one_before_travels_and_no_more(engine, prompts, folder, monkeypatch):
    """Each bucket here travels only once another tensor is asked for. At most two are held, and a tensor beyond."""
    new = tiny.perturbed(folder, 6)
    monkeypatch.setattr(transfer, "buckets", functools.partial(transfer.buckets, limit=60_000))
    planned = [[t.numel() * 4 for _, t in bucket] for bucket in transfer.buckets(tiny.Weights(new))]
    most = max(sum(a) + sum(b) + c[0] for a, b, c in zip(planned[:-1], planned[1:], [*planned[2:], [0]], strict=True))
    source, channel = Fresh(new, most), engine._pool.engines[0].lane.channel
    plain, sent, ready = channel.send, [], []

    def convert(bucket):
        ready.append(source.asked)
        return bucket

    def send(bucket):
        with source.changed:
            assert source.changed.wait_for(lambda: source.asked > min(ready[len(sent)], len(source.named) + 1), 60), "nothing is gathered meanwhile"
        sent.append([t.numel() * 4 for _, t in bucket])
        plain(bucket)

    monkeypatch.setattr(channel, "convert", convert)
    monkeypatch.setattr(channel, "send", send)
    times = engine.send(source, 13)
    assert len(sent) > 5 and sent == planned and times["bytes"] == sum(map(sum, sent))
    assert source.most <= most < 0.6 * times["bytes"]
    assert tiny.worst_difference(new, engine.generate(prompts, **HOT), T) < 1e-4


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


def test_a_free_port_is_not_one_that_the_system_hands_out():
    """Or a connection made while the server starts may take it."""
    assert all(1024 < pick_port(0) < lowest_handed_out() for _ in range(20))


def test_a_found_server_of_another_model_is_never_claimed(engine, prompts, folder, tmp_path, monkeypatch):
    """One that answers only once the policy is there is compared as late as that; the run that it serves goes on."""
    monkeypatch.setenv(TOKEN_VARIABLE, server(engine).token)
    other = shutil.copytree(folder, tmp_path / "other")
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))
    assert (other / "config.json").read_text() != text
    with pytest.raises(UserError, match=rf"rollout.urls: '{server(engine).url}' serves another model: text_config.rms_norm_eps is 1e-05 there, 1e-06 here"):
        open_engine(other, tmp_path, engine="server", urls=[server(engine).url], transfer_timeout_s=30)
    assert engine.generate(prompts, **HOT)


def test_a_found_server_is_trusted_after_a_transfer_only(engine, prompts, model, folder, tmp_path, monkeypatch):
    """Another run takes the server over: it must send first, and from then on the first run is refused by name."""
    found = {"engine": "server", "urls": [server(engine).url], "transfer_timeout_s": 30}
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(UserError, match=TOKEN_VARIABLE):
        open_engine(folder, tmp_path, **found)
    monkeypatch.setenv(TOKEN_VARIABLE, "wrong")
    with pytest.raises(UserError, match=f"refused this run's token; {TOKEN_VARIABLE} must be"):
        open_engine(folder, tmp_path, **found)
    monkeypatch.setenv(TOKEN_VARIABLE, server(engine).token)
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


def taken_back(engine, weights) -> None:
    """The server serves its first run again, which the test before took it from."""
    engine._transfer.broken = ""
    engine._pool.engines[0].lane = None
    engine.send(weights, 6)


def test_a_killed_worker_costs_a_restart_and_no_answer(engine, prompts, folder):
    """The server is started again, given the current weights and asked again: the same tokens as if nothing had been."""
    new = tiny.perturbed(folder, 8)
    taken_back(engine, tiny.Weights(new))
    expected = engine.generate(prompts, **HOT)
    engine._pool._max_restarts, first = 1, family(engine)
    engine.counters()
    worker = next(p for p in first if "Worker" in p.name())
    killed = []

    def kill(*_):
        killed or killed.append(worker.kill())

    groups = engine.generate(prompts, **HOT, on_progress=kill)
    while not (found := engine.counters()).get("restarts") or not killed:   # it may have answered everything before it fell
        groups = engine.generate(prompts, **HOT)
    assert found["restarts"] == 1
    ids = lambda gs: [[(r.token_ids, r.weight_versions) for r in g.responses] for g in gs]
    assert ids(groups) == ids(expected) and {v for g in groups for r in g.responses for v in r.weight_versions} == {6}
    assert tiny.worst_difference(new, engine.generate(prompts, **HOT), T) < 1e-4
    _, alive = psutil.wait_procs(first, timeout=30)
    assert not alive


def test_a_killed_server_is_named_at_once_and_leaves_nothing(engine, prompts, model):
    """Last: it ends the shared server. kill -9 of the API server only, as in an out-of-memory kill; no restart is left."""
    supervisor, api, *rest = family(engine)
    assert rest, "the engine core is a process of its own"
    began = time.monotonic()

    def kill(done, wanted, tokens):
        api.kill()

    with pytest.raises(EngineError, match=rf"rollout server {server(engine).url} .*generate.*API server \(pid {api.pid}\) ended"):
        for step in range(100):
            engine.generate(prompts, **HOT | {"step": step}, on_progress=kill)
    assert time.monotonic() - began < 60
    _, alive = psutil.wait_procs([supervisor, api, *rest], timeout=30)
    assert not alive
    with pytest.raises(EngineError, match=rf"rollout server .*API server \(pid {api.pid}\) ended"):
        engine.send(tiny.Weights(model), 6)
