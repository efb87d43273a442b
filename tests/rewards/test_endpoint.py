"""The endpoint judge against a real HTTP server that answers, refuses, hangs, lies and hangs up."""
import base64
import io
import math
import threading
import time

import pytest
from PIL import Image

from sophiavl_fast.config import Thinking
from sophiavl_fast.errors import UserError
from sophiavl_fast.rewards.thinking import Case, template
from sophiavl_fast.rewards.thinking.breaker import Breaker
from sophiavl_fast.rewards.thinking.chat import completions_url, expected_score
from sophiavl_fast.rewards.thinking.endpoint import EndpointJudge
from tests.rewards.helpers import chat, free_port, honest, judge_server, prompt_text


def case(*qualities, images=()) -> Case:
    return Case("How many?", list(images), [f"quality {q}" for q in qualities], ["42"] * len(qualities), [[i * 10, i * 10 + 1] for i in range(len(qualities))])


def ask(url, *cases, wait=0.05, rest=30.0, **options):
    defaults = {"backend": "endpoint", "url": url, "model": "judge", "timeout_s": 5.0, "batch_timeout_s": 20.0, "retries": 2, "concurrency": 8}
    judge = EndpointJudge(Thinking(**(defaults | options)), template.load("thinking_reward"), longest_wait_s=wait, rest_s=rest)
    try:
        return judge.collect([judge.submit(c) for c in cases])
    finally:
        judge.close()


def values(verdicts):
    return [v.values[0] for found in verdicts for v in found]


def test_scores_come_in_order():
    with judge_server(honest) as server:
        assert values(ask(server.url, case(0.1, 0.75), case(), case(1.0, 0.0, 0.33))) == [0.1, 0.75, 1.0, 0.0, 0.33]


def test_the_request(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    pictures = [Image.new("RGB", (28, 28), colour) for colour in ("red", "blue")]
    with judge_server(honest) as server:
        ask(server.url, case(0.5, images=pictures))
        body = server.bodies[0]
        assert server.headers[0]["Authorization"] == "Bearer sk-test" and server.paths == ["/v1/chat/completions"]
    system, user = body["messages"]
    assert system == {"role": "system", "content": "You are a helpful assistant."} and body["model"] == "judge" and body["temperature"] == 0
    assert [part["type"] for part in user["content"]] == ["image_url", "image_url", "text"]
    head, _, data = user["content"][1]["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == pictures[1].tobytes()
    assert "quality 0.5" in prompt_text(body) and "42" not in prompt_text(body)


def test_the_answer_is_shown_only_when_asked_for():
    with judge_server(honest) as server:
        ask(server.url, case(0.5), include_answer=True)
        assert "42" in prompt_text(server.bodies[0])


def test_no_key_no_header(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with judge_server(honest) as server:
        ask(server.url, case(0.5))
        assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize("given,full", [
    ("http://h:8000", "http://h:8000/v1/chat/completions"), ("http://h:8000/", "http://h:8000/v1/chat/completions"), ("http://h/v1", "http://h/v1/chat/completions"),
    ("http://h/v1/", "http://h/v1/chat/completions"), ("https://h/v1/chat/completions", "https://h/v1/chat/completions"),
    ("https://h/openai/v1/chat/completions/", "https://h/openai/v1/chat/completions"), ("https://h/v1beta", "https://h/v1beta/chat/completions"),
    ("https://h/v1?api-version=3", "https://h/v1/chat/completions?api-version=3")])
def test_base_or_full_url(given, full):
    assert completions_url(given) == full


@pytest.mark.parametrize("given", ["h:8000", "", "ftp://h", "/v1", "http://", "http://[bad/v1", "http://h:port/v1", "http://h:99999/v1"])
def test_what_is_no_url(given):
    with pytest.raises(UserError, match=r"is not an http\(s\) URL"):
        completions_url(given)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_passing_failures_are_tried_again(status):
    def twice(handler, body, number):
        handler.reply("busy", status) if number < 2 else honest(handler, body, number)

    with judge_server(twice) as server:
        assert values(ask(server.url, case(0.6))) == [0.6] and len(server.bodies) == 3


def test_half_closed_connections_are_tried_again():
    with judge_server(lambda h, body, number: h.hang_up() if number < 2 else honest(h, body, number)) as server:
        assert values(ask(server.url, case(0.6))) == [0.6] and len(server.bodies) == 3


@pytest.mark.parametrize("status,hint", [(401, "OPENAI_API_KEY"), (404, "thinking.model"), (400, "too long"), (307, "redirects")])
def test_lasting_failures_are_not_tried_again(status, hint):
    with judge_server(lambda h, *_: h.reply("prompt too long", status, headers={"Location": "http://elsewhere/"})) as server:
        (found,), = ask(server.url, case(0.6), score="parse")
        assert math.isnan(found.values[0]) and hint in found.reason and str(status) in found.reason and server.url in found.reason and "\n" not in found.reason
        assert len(server.bodies) == 1
        with pytest.raises(UserError, match=f"thinking.url '{server.url}/chat/completions': .*{hint}"):
            ask(server.url, case(0.6), score="parse", on_error="fail")


@pytest.mark.parametrize("reply,kind,reason", [
    ("<html>welcome</html>", "text/html", "answers with HTML"), ("{\"choices\": [", "application/json", "other than JSON"),
    ("[]", "application/json", "chat/completions format"),
    ({"choices": []}, "application/json", "chat/completions format"), ({"choices": [{"message": {"content": 3}}]}, "application/json", "format"),
    ({"error": {"message": "x"}}, "application/json", "format"),
    (chat(""), "application/json", "no score"), (chat("<answer>7</answer>"), "application/json", "not in")])
def test_garbage_is_nan_with_a_reason(reply, kind, reason):
    with judge_server(lambda h, *_: h.reply(reply, kind=kind)) as server:
        (found,), = ask(server.url, case(0.6))
        assert math.isnan(found.values[0]) and reason in found.reason


def test_one_bad_reply_spoils_no_other():
    def judge(handler, body, number):
        handler.reply("<html>", kind="text/html") if "0.2" in prompt_text(body).rpartition("quality")[2] else honest(handler, body, number)

    with judge_server(judge) as server:
        found = values(ask(server.url, case(0.1, 0.2, 0.3)))
    assert found[::2] == [0.1, 0.3] and math.isnan(found[1])


def test_a_hanging_call_has_a_deadline_and_so_has_a_dripping_one():
    def drip(handler, body, number):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not handler.server.over.wait(0.05):
            handler.wfile.write(b" ")

    for behaviour in (lambda h, *_: h.server.over.wait(60), drip):
        with judge_server(behaviour) as server:
            (found,), = ask(server.url, case(0.6), timeout_s=0.4, retries=1)
            assert math.isnan(found.values[0]) and "no answer within thinking.timeout_s = 0.4" in found.reason and len(server.bodies) == 2


def test_a_step_has_a_deadline():
    def slow(handler, body, number):
        honest(handler, body, number) if "0.1" in prompt_text(body).rpartition("quality")[2] else handler.server.over.wait(60)

    with judge_server(slow) as server:
        found, late = ask(server.url, case(0.1, 0.2), timeout_s=50, batch_timeout_s=1.0)[0]
        assert found.values == (0.1,) and math.isnan(late.values[0]) and "unanswered after thinking.batch_timeout_s = 1" in late.reason
        with pytest.raises(UserError, match="1 of 2 calls unanswered"):
            ask(server.url, case(0.1, 0.2), timeout_s=50, batch_timeout_s=1.0, on_error="fail")


def test_concurrency_is_used_and_bounded():
    def slow(handler, body, number):
        time.sleep(0.05)
        honest(handler, body, number)

    with judge_server(slow) as server:
        assert len(values(ask(server.url, *[case(*[0.5] * 8)] * 5, concurrency=4))) == 40
        assert server.most == 4


def test_endpoint_down():
    url = f"http://127.0.0.1:{free_port()}/v1"
    (found,), = ask(url, case(0.6), retries=1)
    assert math.isnan(found.values[0]) and "endpoint down" in found.reason
    with pytest.raises(UserError, match=f"thinking.url '{url}/chat/completions': .*endpoint down"):
        ask(url, case(0.6), on_error="fail")


def test_a_model_that_is_not_served_fails_before_any_call():
    with judge_server(honest) as server, pytest.raises(UserError, match=r"'jugde' is not served at .*; it serves: judge"):
        ask(server.url, on_error="fail", model="jugde")


def test_the_circuit_opens_and_closes_again():
    broken = threading.Event()

    def judge(handler, body, number):
        handler.reply("down", 503) if broken.is_set() else honest(handler, body, number)

    broken.set()
    with judge_server(judge) as server:
        settings = Thinking(backend="endpoint", url=server.url, model="judge", retries=0, concurrency=8)
        judge_ = EndpointJudge(settings, template.load("thinking_reward"), rest_s=0.3)
        found = judge_.collect([judge_.submit(case(*[0.5] * 40))])[0]
        asked = len(server.bodies)
        assert all(math.isnan(v.values[0]) for v in found) and asked < 20 and "not asked for now" in found[-1].reason and "HTTP 503" in found[-1].reason
        broken.clear()
        time.sleep(0.4)
        assert values(judge_.collect([judge_.submit(case(0.7))])) == [0.7]
        assert values(judge_.collect([judge_.submit(case(*[0.7] * 20))])) == [0.7] * 20
        judge_.close()


def test_breaker():
    now = [0.0]
    breaker = Breaker(2, 10.0, clock=lambda: now[0])
    for cause in ("a", "b"):
        assert breaker.refusal() == ""
        breaker.failed(cause)
    assert "after 2 failures in a row: b" in breaker.refusal()
    now[0] = 11.0
    assert [breaker.refusal() == "" for _ in range(3)] == [True, False, False]  # one goes first
    breaker.succeeded()
    assert breaker.refusal() == ""


def tokens(*steps):
    """Greedy tokens with their alternatives: (chosen, {token: probability})."""
    return [{"token": chosen, "logprob": math.log(p[chosen]), "top_logprobs": [{"token": t, "logprob": math.log(q)} for t, q in p.items()]}
            for chosen, p in steps]


def test_expectation_from_logprobs():
    digits = {"8": 0.6, "4": 0.3, "</": 0.1}
    reply = tokens(("<answer>", {"<answer>": 1.0}), ("0", {"0": 0.9, "1": 0.1}), (".", {".": 1.0}), ("8", digits), ("</answer>", {"</answer>": 1.0}))
    expected = (0.1 * 1.0 + 0.9 * (0.6 * 0.8 + 0.3 * 0.4)) / (0.1 + 0.9 * 0.9)
    assert expected_score(reply, 0.8) == pytest.approx(expected)
    assert expected_score(tokens(("0.8", {"0.8": 0.5, "0.9": 0.5})), 0.8) == pytest.approx(0.85)
    assert expected_score(tokens(("1", {"1": 0.6, "0": 0.4}), (".", {".": 1.0}), ("0", {"0": 1.0})), 1.0) is None  # what follows a '0' is not known
    assert expected_score(tokens(("1", {"1": 0.99, "0": 0.01}), (".", {".": 1.0}), ("0", {"0": 1.0})), 1.0) == pytest.approx(1.0)
    with judge_server(lambda h, *_: h.reply(chat("<answer>0.8</answer>", reply))) as server:
        assert values(ask(server.url, case(0.8))) == [pytest.approx(expected)]
        assert server.bodies[0]["logprobs"] is True and server.bodies[0]["top_logprobs"] == 20
        assert values(ask(server.url, case(0.8), score="parse")) == [0.8] and "logprobs" not in server.bodies[1]


def odd(change) -> list[dict]:
    """Well-formed log-probs of '0.8', and a change to the last token's."""
    found = tokens(("0", {"0": 1.0}), (".", {".": 1.0}), ("8", {"8": 0.5, "4": 0.5}))
    change(found[-1])
    return found


@pytest.mark.parametrize("change", [
    lambda last: last.update(logprob=None, top_logprobs=[{"token": "8", "logprob": None}]), lambda last: last["top_logprobs"][1].pop("logprob"),
    lambda last: last["top_logprobs"][1].update(logprob=1e300), lambda last: last["top_logprobs"][1].update(logprob=700.0),
    lambda last: last["top_logprobs"][1].update(logprob="-1"), lambda last: last["top_logprobs"][1].update(logprob=math.nan),
    lambda last: last["top_logprobs"][1].update(token=None), lambda last: last["top_logprobs"][1].pop("token"), lambda last: last.pop("token"),
    lambda last: last.update(top_logprobs=5), lambda last: last.update(top_logprobs={"8": -1}), lambda last: last.update(top_logprobs=["8"])])
def test_odd_logprobs_are_none(change):
    with judge_server(lambda h, *_: h.reply(chat("0.8", odd(change)))) as server:
        assert values(ask(server.url, case(0.8))) == [0.8]


@pytest.mark.parametrize("block", [[1], "no", 5, {"content": 5}, {"content": "0.8"}, {"content": {"a": 1}}, {"content": None}, {"tokens": ["0.8"]}])
def test_logprobs_of_another_format_are_none(block):
    reply = chat("0.8")
    reply["choices"][0]["logprobs"] = block
    with judge_server(lambda h, *_: h.reply(reply)) as server:
        assert values(ask(server.url, case(0.8))) == [0.8]


def test_a_server_without_logprobs_is_asked_without():
    def judge(handler, body, number):
        handler.reply("logprobs not supported", 400) if "logprobs" in body else honest(handler, body, number)

    with judge_server(judge) as server:
        assert values(ask(server.url, case(0.8, 0.3), concurrency=1)) == [0.8, 0.3]
        assert ["logprobs" in body for body in server.bodies] == [True, False, False]


def test_samples_have_their_own_seeds_and_a_temperature():
    with judge_server(lambda h, body, number: h.reply(chat(f"{body['seed'] / 100}"))) as server:
        (found,) = ask(server.url, case(0.1, 0.2), samples=2)
        assert [v.values for v in found] == [(0.0, 0.01), (0.1, 0.11)] and all(body["temperature"] == 1.0 for body in server.bodies)
    with judge_server(lambda h, body, number: h.reply(chat("0.5" if body["seed"] == 0 else "?"))) as server:
        ((found,),) = ask(server.url, case(0.1), samples=2)
        assert found.values[0] == 0.5 and math.isnan(found.values[1]) and found.reason


def test_close_ends_hanging_calls_and_the_thread():
    with judge_server(lambda h, *_: h.server.over.wait(60)) as server:
        judge = EndpointJudge(Thinking(backend="endpoint", url=server.url, model="judge"), template.load("thinking_reward"))
        judge.submit(case(0.1, 0.2))
        judge.close()
        judge.close()
    assert not [t for t in threading.enumerate() if t.name == "thinking-endpoint"]
