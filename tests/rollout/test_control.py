"""An engine that another thread has given up meanwhile is a lost one, not an accident."""
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
import uvicorn

from sophiavl_fast.config import build
from sophiavl_fast.errors import EngineLost, UserError
from sophiavl_fast.rollout import identity
from sophiavl_fast.rollout.machine import own_address
from sophiavl_fast.rollout.middleware import TOKEN_VARIABLE, TokenMiddleware
from sophiavl_fast.rollout.pool import Pool
from sophiavl_fast.rollout.server import pick_port
from sophiavl_fast.rollout.transfer import Lane, Transfer
from sophiavl_fast.rollout.transfer.gloo import GlooChannel
from sophiavl_fast.rollout.transfer.http import HttpControl
from sophiavl_fast.rollout.transfer.process_group import Group, open_store


def test_a_closed_connection_is_a_lost_engine():
    control = HttpControl(f"http://127.0.0.1:{pick_port(0)}", "token", 5.0, None)
    with pytest.raises(EngineLost, match="cannot be reached for"):
        control.start()
    control.close()
    with pytest.raises(EngineLost, match=r"rollout server http://127.0.0.1:\d+ was given up before"):
        control.start()


def test_a_closed_group_is_a_lost_engine():
    channel = GlooChannel.__new__(GlooChannel)
    channel._control = HttpControl(f"http://127.0.0.1:{pick_port(0)}", "token", 5.0, None)
    channel.close()
    with pytest.raises(EngineLost, match="was given up before the weight transfer"):
        channel.send([])


def test_a_found_server_that_refuses_the_token_is_bad_input(tmp_path, monkeypatch):
    """The middleware that guards every route, before anything is transferred: the line names the variable."""
    monkeypatch.setenv(TOKEN_VARIABLE, "right")
    server = uvicorn.Server(uvicorn.Config(TokenMiddleware(None), port=(port := pick_port(0)), log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    monkeypatch.setenv(TOKEN_VARIABLE, "wrong")
    url = f"http://127.0.0.1:{port}"
    HttpControl(url, "wrong", 5.0, None).wait_ready(30.0, None)
    config = build({"recipe": "rl", "model": {"path": str(tmp_path)}, "data": {"train": "x"}, "rollout": {"engine": "server", "urls": [url]}})
    with pytest.raises(UserError, match=f"^rollout server {url} refused this run's token; {TOKEN_VARIABLE} must be the one the server was started with$"):
        identity.refuse_others(config, [url])
    server.should_exit = True
    thread.join(30)


@pytest.fixture
def pool():
    """Two engines found running, which have this run's weights; nobody listens there any more."""
    found = Pool(2, [f"http://127.0.0.1:{pick_port(0)}" for _ in range(2)], start=None, control=lambda e: HttpControl(e.url, "token", 5.0, None), channel=None,
                 compare=None, nonce="n", banned_ids=[], max_restarts=3, start_timeout_s=5.0)
    for engine in found.engines:
        channel = GlooChannel.__new__(GlooChannel)
        engine.lane, engine.state = Lane(HttpControl(engine.url, "token", 5.0, None), channel), "ready"
    yield found
    found.close()


def test_a_picked_engine_keeps_the_way_to_it_and_its_next_life_is_not_burdened(pool):
    picked = pool.pick()
    engine = picked.engine
    pool.lose(engine, engine.life, EngineLost("died meanwhile"))
    assert picked.control.url == engine.url and engine.life == picked.life + 1
    pool.carry(picked, 1)
    assert engine.load == 0 and pool.pick().engine is not engine


def test_an_engine_lost_as_a_transfer_begins_stays_lost(pool, monkeypatch):
    """By another thread, such as that of a rollout ahead."""
    lanes = pool._lanes

    def losing(*arguments):
        found = lanes(*arguments)
        for engine in pool.engines:
            pool.lose(engine, 0, EngineLost("died meanwhile"))
        return found

    monkeypatch.setattr(pool, "_lanes", losing)
    with pytest.raises(EngineLost, match=r"^died meanwhile$"):
        pool.send(Transfer(nonce="n", checksums=False), object(), 1)
    assert [(e.state, e.life) for e in pool.engines] == [("lost", 1)] * 2


def test_a_server_without_an_ipv4_address_is_one_line():
    assert own_address("http://127.0.0.1:8000") == "127.0.0.1"
    with pytest.raises(UserError, match=r"^rollout.urls: 'http://\[::1\]:8000' has no IPv4 address .*; set rollout.transfer_host to this machine's$"):
        own_address("http://[::1]:8000")


def test_gloo_travels_by_the_address_that_was_named():
    """And not by the one that the machine's name stands for: another machine could not reach a loopback."""
    port = pick_port(0)
    stores = [open_store("127.0.0.1", port, 2, 30.0, master=master) for master in (True, False)]
    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(lambda rank: Group(stores[rank], rank, 2, 30.0, "127.0.0.2"), range(2)))
        sent = [torch.arange(4.0), torch.zeros(4)]
        list(pool.map(lambda rank: groups[rank].broadcast(sent[rank]), range(2)))
    assert torch.equal(*sent)
    assert "127.0.0.2" in {c.raddr.ip for c in psutil.Process().net_connections("tcp4") if c.status == psutil.CONN_ESTABLISHED}
