"""reward serve: a real vLLM server behind a token, gone with whoever started it, and the whole way from traces to a trusted judge."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from sophiavl_fast.cli import main
from sophiavl_fast.recipes.serve_judge import lines_to_paste

ROOT = Path(__file__).resolve().parents[2]


def started(model, log, **environment):
    """The process, its URL and everything it printed until it was ready."""
    line = [sys.executable, "-m", "sophiavl_fast", "reward", "serve", str(model), "--port", "0", "--template", "demo_judge", "--log", str(log)]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    said = []
    while not said or "trainer needs" not in said[-1]:
        text = process.stdout.readline()
        assert text, f"it ended: {said} {log.read_text()[-2000:] if log.exists() else ''}"
        said.append(text)
    return process, next(text.split()[-1] for text in said if text.startswith("ready at")), said


@pytest.mark.engine
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_it_wants_its_key_and_leaves_nobody_behind(number, tmp_path):
    from sophiavl_fast.data.demo import tiny_model

    tiny_model.build(tmp_path / "judge", 0)
    process, url, said = started(tmp_path / "judge", tmp_path / "serve.log", OPENAI_API_KEY="secret of the test")
    try:
        family = psutil.Process(process.pid).children(recursive=True)
        assert url.startswith("http://127.0.0.1:") and "secret of the test" not in "".join(said)
        assert all("secret of the test" not in " ".join(p.cmdline()) for p in family)
        key = {"Authorization": "Bearer secret of the test"}
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            for route in ("/models", "/../health", "/../pause"):
                assert client.get(route).status_code == 401
            assert client.get("/models", headers=key).json()["data"][0]["id"] == "thinking-reward-model"
            body = {"model": "thinking-reward-model", "messages": [{"role": "user", "content": "sum?"}], "max_tokens": 2, "logprobs": True, "top_logprobs": 20}
            reply = client.post("/chat/completions", json=body, headers=key).json()
            assert len(reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 20
    finally:
        os.kill(process.pid, number)
        code = process.wait(60)
    assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    deadline = time.monotonic() + 60
    while alive := [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def test_the_lines_to_paste():
    text = lines_to_paste("http://127.0.0.1:8000", "judge", "demo_judge", "abc")
    assert "  url: http://127.0.0.1:8000/v1\n  model: judge\n  template: demo_judge" in text and text.endswith("export OPENAI_API_KEY=abc")
    assert "abc" not in lines_to_paste("http://127.0.0.1:8000", "judge", "demo_judge", None)


@pytest.mark.parametrize("arguments,expected", [
    (("nowhere",), "'nowhere' is no model folder"), (("{model}", "--template", "demo_jugde"), "did you mean 'demo_judge'"),
    (("{model}", "--port", "{taken}"), "cannot be had on 127.0.0.1"), (("{model}", "--port", "70000"), "--port: 70000: must lie in [0, 65535]")])
def test_it_refuses_in_one_line(arguments, expected, tmp_path, capsys):
    import socket

    (tmp_path / "config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        filled = [a.format(model=tmp_path, taken=taken.getsockname()[1]) for a in arguments]
        try:
            code = main(["reward", "serve", *filled])
        except SystemExit as ended:     # what the parser itself refuses
            code = ended.code
    said = capsys.readouterr().err.splitlines()
    assert code == 2 and len(said) == 1 and expected in said[0]


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(5400)
def test_from_traces_to_a_judge_that_deserves_trust(tmp_path):
    """On held-out pictures: rank correlation, and sound told from flawed among right and among wrong answers, unseen kinds included."""
    done = subprocess.run(["bash", "scripts/thinking_reward_demo.sh"], cwd=ROOT, text=True, capture_output=True, timeout=5000, env={
        **os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "DATA": str(tmp_path / "data"), "MODEL": str(tmp_path / "model")})
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    print(json.dumps({k: v for k, v in found.items() if k != "traces"}, indent=1))
    assert found["spearman"] >= 0.7 and found["answers_right"]["auc"] >= 0.8 and found["answers_wrong"]["auc"] >= 0.8 and found["trust"]["deserved"]
    for kind in ("astray", "half_misread"):
        assert found["kinds"][kind]["auc_against_sound"] >= 0.8, kind
    steps = [json.loads(line) for line in (tmp_path / "out" / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3 and all(step["reward/unscored"] == 0 for step in steps)
