"""What an RL or SFT run refuses before its weights are loaded: absent packages, ports and endpoints, held-out sets, records that would end it in the middle."""
import importlib
import importlib.util
import json
import logging
import re
import shutil
import socket
import time
from pathlib import Path

import pytest
from PIL import Image

from sophiavl_fast import config as tree
from sophiavl_fast.errors import UserError
from sophiavl_fast.policy import Policy
from sophiavl_fast.recipes import preflight, rl, sft
from sophiavl_fast.rollout import identity
from sophiavl_fast.rollout.middleware import TOKEN_VARIABLE
from sophiavl_fast.rollout.server import Server, pick_port
from tests.rewards.helpers import honest, judge_server

ROOT = Path(__file__).resolve().parent.parent.parent
GOOD = {"problem": "sum?", "data_type": "text", "problem_type": "numerical", "options": [], "process": "1+2=3\n", "solution": "<answer>0.3</answer>",
        "path": "", "data_source": "t", "score": 0.3}


class Loaded(Exception):
    """The run has come to its weights."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from sophiavl_fast.data.demo import tiny_model

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model.build(folder, 0)
    return folder


@pytest.fixture
def start(tmp_path, model, monkeypatch):
    """Starts a run of two sets, `mine` and `held`, each of one good record and one changed; ends at the latest where it would load the weights."""
    def create(*_, **__):
        raise Loaded

    monkeypatch.setattr(Policy, "create", create)
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")

    def run(*more: str, mine: dict | None = None, held: dict | None = None, recipe: str = "rl", both: bool = False):
        registry = {}
        for name, change in (("mine", mine), ("held", held)):
            rows = [GOOD | {"problem_id": 0} | ((change or {}) if both else {}), GOOD | {"problem_id": 1} | (change or {})]
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            registry[name] = {"file_path": f"{name}.jsonl", "template": "plain"}
        (tmp_path / "registry.json").write_text(json.dumps(registry))
        (tmp_path / "run.yaml").write_text(f"recipe: {recipe}\n")
        config = tree.load(tmp_path / "run.yaml", [
            f"data.registry={tmp_path}/registry.json", "data.train=mine", f"run.dir={tmp_path}/run", f"model.path={model}", "run.steps=1", "device=cpu",
            "model.dtype=float32", "data.max_prompt_tokens=400", "rollout.max_new_tokens=8", "rollout.prompts_per_step=2", "sft.batch_size=2",
            "monitor.tensorboard=false", *(["eval.every=1", "data.eval=held", "rollout.engine=inline"] if recipe == "rl" else []), *more])
        return (rl if recipe == "rl" else sft).train(config)
    return run


def test_a_good_run_comes_to_its_weights(start):
    for recipe in ("rl", "sft"):
        with pytest.raises(Loaded):
            start(recipe=recipe)


@pytest.mark.parametrize("more,held,line", [
    (("data.eval=hold",), {}, "dataset 'hold' is not in registry .*; did you mean 'held'"),
    ((), {"solution": ""}, "held.jsonl:2: record without solution"),
    ((), {"reasoning_check": "demo_digit"}, "held.jsonl:2: reasoning_check 'demo_digit': no such rule; did you mean 'demo_digits'"),
    ((), {"reasoning_check": ["demo_digits"]}, "held.jsonl:2: reasoning_check must be the name of a rule, not list"),
    ((), {"reasoning_check": "demo_digits"}, r"held.jsonl:2: reasoning_check 'demo_digits' cannot read the record \(KeyError: 'kind'\)"),
    ((), {"solution": "$"}, r"held.jsonl:2: the solution '\$' can be matched by no answer"),
    ((), {"path": ["a.png"] * 17}, "held.jsonl:2: 17 images; the rollout engine takes at most 16"),
    (("rollout.max_model_len=408", "eval.max_new_tokens=380"), {"problem": "1" * 40}, r"held.jsonl:2: the prompt has \d+ tokens: with 380 new ones more "
     r"than the 408 of the engine; raise rollout.max_model_len or lower eval.max_new_tokens"),
])
def test_the_held_out_set_is_looked_at_first(start, more, held, line):
    with pytest.raises(UserError, match=line):
        start(*more, held=held)


def test_bad_held_out_records_can_be_left_out(start, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(Loaded):
        start("data.on_error=skip", held={"reasoning_check": "demo_digit"})
    assert "held: 1 of 2 held-out records cannot be used and are left out; one of them: " in caplog.text and "held.jsonl:2" in caplog.text
    with pytest.raises(UserError, match=r"held.jsonl:1: .*no such rule.* \(data.eval = held: none of the 2 records asked for can be used\)"):
        start("data.on_error=skip", held={"reasoning_check": "demo_digit"}, both=True)


@pytest.mark.parametrize("recipe,mine,more,line", [
    ("rl", {"path": ["a.png"] * 17}, (), "17 images; the rollout engine takes at most 16 a prompt"),
    ("rl", {"problem_type": "multiple_choice", "options": ["w", "x"], "solution": "E"}, (), "the solution 'E' names none of the 2 options"),
    ("rl", {"reasoning_check": "none"}, (), "reasoning_check 'none': no such rule"),
    ("rl", {"problem": "1" * 300}, ("rollout.max_new_tokens=300",), r"the prompt has \d+ tokens: with 300 new ones more than the 512 of the model itself"),
    ("sft", {"process": ""}, (), "record 1 has no 'process' to learn from; use sft.target=solution"),
    ("sft", {"score": "0.3"}, ("sft.soft_score=score",), "record 1: 'score' is '0.3', but sft.soft_score = score wants a number"),
    ("sft", {"score": 0.9}, ("sft.soft_score=score",), "record 1: its solution is '0.3' but its 'score' is 0.9"),
])
def test_a_record_that_would_end_the_run_is_a_bad_record(start, caplog, recipe, mine, more, line):
    with pytest.raises(UserError, match=rf"mine.jsonl:2: {line}"):
        start(*more, mine=mine, recipe=recipe)
    with caplog.at_level(logging.WARNING), pytest.raises(Loaded):
        start(*more, "data.on_error=skip", mine=mine, recipe=recipe)
    assert "mine: 1 of 2 records cannot be used and are replaced when met" in caplog.text


def test_packages_that_are_not_installed(start, monkeypatch):
    importing, finding = importlib.import_module, importlib.util.find_spec
    monkeypatch.setattr(importlib, "import_module", lambda name, *a: importing(name.replace("wandb", "wandb_that_is_not_there"), *a))
    for recipe in ("rl", "sft"):
        with pytest.raises(UserError, match=r"monitor.wandb: true, but wandb cannot be imported"):
            start("monitor.wandb=true", recipe=recipe)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else finding(name, *a))
    with pytest.raises(UserError, match=r"rollout.engine: inline needs vLLM, which is not installed"):
        start()
    with pytest.raises(Loaded):
        start(recipe="sft")


def test_a_port_that_is_taken(start, tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for first, engines in ((port, 1), (port - 1, 2)):
            with pytest.raises(UserError, match=rf"rollout.port = {port} cannot be had on 127.0.0.1"):
                start("rollout.engine=server", f"rollout.port={first}", f"rollout.engines={engines}")
        with pytest.raises(UserError, match=r"rollout.port = 65535 is the first of 2 servers' ports, which end at 65535; choose at most 65534"):
            start("rollout.engine=server", "rollout.port=65535", "rollout.engines=2")
        # the server of a run that was killed just before may still be ending
        (tmp_path / "run" / "rollout.log").write_text("")
        monkeypatch.setattr(time, "sleep", lambda _: taken.close())
        with pytest.raises(Loaded):
            start("rollout.engine=server", f"rollout.port={port}")


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    """A real server of the tiny model, as `python -m sophiavl_fast.rollout.serve` starts it."""
    config = tree.build({"model": {"path": str(model), "dtype": "float32"}, "data": {"max_prompt_tokens": 400},
                         "rollout": {"max_new_tokens": 8, "max_num_seqs": 8}})
    server = Server(config, device="cpu", backend="gloo", run_dir=tmp_path_factory.mktemp("served"), token="secret")
    server.wait_ready(900.0)
    yield server
    server.close()


def other_model(model: Path, folder: Path, **text) -> Path:
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"text_config": config["text_config"] | text}))
    return folder


@pytest.mark.engine
def test_a_server_of_another_model_is_refused_before_weights_are_loaded(start, served, model, tmp_path, monkeypatch):
    """Also where every tensor has the same shape. The same model in another folder is the same."""
    monkeypatch.setenv(TOKEN_VARIABLE, served.token)
    found = ("rollout.engine=server", f"rollout.urls=[{served.url}]")
    with pytest.raises(Loaded):
        start(*found, f"model.path={other_model(model, tmp_path / 'same', use_cache=False)}")
    for text, said in (({"rms_norm_eps": 1e-6}, "text_config.rms_norm_eps is 1e-05 there, 1e-06 here"),
                       ({"intermediate_size": 256}, "intermediate_size is 512")):
        folder = other_model(model, tmp_path / "-".join(text), **text)
        with pytest.raises(UserError, match=rf"^rollout.urls: '{served.url}' serves another model: .*{said}.* set model.path='{model}', or start the server "
                           rf"anew with model.path='{folder}'$"):
            start(*found, f"model.path={folder}")
    with pytest.raises(UserError, match=rf"^rollout.urls: '{served.url}' serves .* in another precision: float32 there, model.dtype = bfloat16 here; .*"):
        start(*found, "model.dtype=bfloat16")
    with pytest.raises(UserError, match=rf"^rollout.urls: '{served.url}' holds 408 tokens .*, this run 409; set rollout.max_model_len=408, or start"):
        start(*found, "rollout.max_model_len=409")
    with pytest.raises(UserError, match=rf"^rollout.urls: '{served.url}' serves with model.max_pixels = null, this run has 9999; set model.max_pixels=null"):
        start(*found, "model.max_pixels=9999")
    with monkeypatch.context() as elsewhere:                      # the same answer, from a machine with a loopback of its own
        elsewhere.setattr(identity, "this_machine", lambda: {"name": "here", "loopback": "another boot"})
        with pytest.raises(UserError, match=rf"^rollout.urls: '{served.url}' is a tunnel to the engine's machine \({socket.gethostname()}\), .* set "
                           rf"rollout.transfer_host to the address at which {socket.gethostname()} reaches this machine$"):
            start(*found)
        with pytest.raises(Loaded):
            start(*found, "rollout.transfer_host=127.0.0.2")
    with pytest.raises(UserError, match=r"^rollout.transfer_host = '192.0.2.7' is no IPv4 address of this machine .*; `hostname -I` lists them$"):
        start(*found, "rollout.transfer_host=192.0.2.7")
    monkeypatch.setattr(identity, "METHOD", "sophia_unheard_of")   # what a server that was started by an older version answers
    with pytest.raises(UserError, match=rf"^rollout.urls: '{served.url}' does not tell which model it serves.*; start it anew"):
        start(*found)


def test_a_server_that_is_still_starting_is_compared_once_it_answers(start, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    with pytest.raises(Loaded):
        start("rollout.engine=server", f"rollout.urls=['http://127.0.0.1:{pick_port(0)}']")


@pytest.mark.parametrize("parallel,processes,leads", [
    ({}, 3, {0: 0, 1: 1, 2: 2}), ({"tensor": 2, "context": 2}, 8, {0: 0, 4: 1}), ({"tensor": 2, "pipeline": 2}, 8, {0: 0, 2: 1})])
def test_each_lead_asks_its_own_servers(monkeypatch, parallel, processes, leads):
    """Ranks as policy.distributed numbers them: the stages of a pipeline lie furthest apart."""
    config = tree.build({"parallel": parallel, "rollout": {"urls": [f"http://h:{i}" for i in range(1, 6)]}})
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        assert preflight.own_urls(config) == (config.rollout.urls[leads[rank]::len(leads)] if rank in leads else [])


def test_an_endpoint_that_does_not_answer_is_told_of_where_its_scores_may_be_dropped(start, capsys):
    asked = ("thinking.backend=endpoint", "thinking.model=jury", "thinking.on_error=drop")
    with judge_server(honest) as server:
        for url, cause in (("http://127.0.0.1:9/v1", "endpoint down"), (server.url, "is not served at")):
            with pytest.raises(Loaded):
                start(*asked, f"thinking.url={url}")
            assert re.search(rf"^sophiavl-fast: thinking.*{cause}.*; the run goes on .* which leaves plain GRPO\)$", capsys.readouterr().err, re.M)
        with pytest.raises(Loaded):
            start(*asked, f"thinking.url={server.url}", "thinking.model=judge")
        with pytest.raises(Loaded):
            start(*asked, "thinking.url=http://127.0.0.1:9/v1", "algorithm.name=grpo")      # asks for no scores
        assert "plain GRPO" not in capsys.readouterr().err


def test_the_doctors_judge():
    def row(**thinking):
        found = preflight.judge_rows(tree.build({"recipe": "rl", "thinking": {"backend": "endpoint", "model": "judge"} | thinking}))
        return [(r.status, r.found) for r in found]

    with judge_server(honest) as server:
        assert row(url=server.url) == [("OK", f"'judge' at {server.url}")]
        [(status, found)] = row(url=server.url, model="jury")
        assert status == "WARN" and "is not served at" in found
    dead = "http://127.0.0.1:9/v1"
    assert row(url=dead)[0][0] == "WARN" and row(url=dead, on_error="fail")[0][0] == row(url="nowhere")[0][0] == "FAIL"
    assert row(url=dead, serve=True, path="x") == row(backend="off") == []


def test_an_endpoint_that_does_not_answer(start):
    with pytest.raises(UserError, match=r"127.0.0.1:9/v1.*endpoint down"):
        start("thinking.backend=endpoint", "thinking.url=http://127.0.0.1:9/v1", "thinking.model=judge", "thinking.on_error=fail")
    with judge_server(honest) as server:
        with pytest.raises(UserError, match=r"thinking.model 'jury' is not served at"):
            start("thinking.backend=endpoint", f"thinking.url={server.url}", "thinking.model=jury", "thinking.on_error=fail")
        with pytest.raises(Loaded):
            start("thinking.backend=endpoint", f"thinking.url={server.url}", "thinking.model=judge", "thinking.on_error=fail")
    with pytest.raises(UserError, match=r"thinking.include_answer is set, but thinking.template 'demo_judge' has no place for the answer"):
        start("thinking.backend=endpoint", "thinking.url=http://127.0.0.1:9/v1", "thinking.model=judge", "thinking.template=demo_judge",
              "thinking.include_answer=true")


def test_only_the_first_rank_asks(monkeypatch):
    config = tree.build({"monitor": {"tensorboard": False, "wandb": True}})
    monkeypatch.setenv("RANK", "1")
    preflight.refuse_absent(config)
