"""reward evaluate against real HTTP judges: labels and pairs, in both orders."""
import itertools
import json
import math
import re

import pytest
from PIL import Image

from sophiavl_fast.cli import main
from sophiavl_fast.data.images import open_image
from sophiavl_fast.errors import UserError
from sophiavl_fast.evaluate.judge import pairs
from sophiavl_fast.evaluate.judge.command import evaluate
from sophiavl_fast.evaluate.judge.pairs import choice
from sophiavl_fast.rewards.model.panel import Asking, JudgeSpec
from tests.rewards.helpers import chat, honest, judge_server, prompt_text
from tests.rewards.model.helpers import trace, write


def run(source, out, url, layout="scores", **more):
    asking = Asking(timeout_s=5.0, retries=1, concurrency=4, score=more.pop("score", "expected"))
    text = evaluate(source, out, [JudgeSpec(url, "judge")], asking, layout=layout, open_image=open_image, **more)
    return json.loads(out.read_text()), text


def test_agreement_with_labels(tmp_path):
    rows = [trace(i, i / 20) | {"score": i / 20, "kind": "sound" if i > 15 else "slip", "right": i % 2 == 0} for i in range(21)]
    with judge_server(honest) as server:
        found, text = run(write(tmp_path / "labels.jsonl", rows), tmp_path / "result.json", server.url)
    assert found["spearman"] == pytest.approx(1.0) and found["mae"] < 1e-6 and found["auc"] == 1.0 and found["count"] == 21 and found["unscored"] == 0
    assert found["trust"]["deserved"] is True and "deserves trust: yes" in text and found["model"] == "judge"
    with Image.open(found["calibration_picture"]) as picture:
        assert picture.size[0] > 300 and len(picture.getcolors(1 << 20)) > 8


def test_scores_come_from_log_probs_where_they_are_given(tmp_path):
    def sure_by_half(handler, body, number):
        quality = float(re.search(r"quality ([0-9.]+)", prompt_text(body))[1])
        tokens = [{"token": t, "logprob": 0.0, "top_logprobs": [{"token": t, "logprob": 0.0}]} for t in ("0", ".")]
        options = [{"token": "4", "logprob": math.log(1 - quality)}, {"token": "9", "logprob": math.log(quality)}]
        last = options[0] | {"top_logprobs": options}
        handler.reply(chat("0.4", [*tokens, last] if "logprobs" in body else None))

    rows = [trace(i, (i + 1) / 12) | {"score": (i + 1) / 12} for i in range(6)]
    with judge_server(sure_by_half) as server:
        found, _ = run(write(tmp_path / "labels.jsonl", rows), tmp_path / "result.json", server.url)
        assert found["spearman"] == pytest.approx(1.0) and found["ties"] == 0.0 and found["trust"]["deserved"] is not True
        found, _ = run(tmp_path / "labels.jsonl", tmp_path / "result.json", server.url, score="parse")
        assert found["spearman"] is None and found["ties"] == 1.0


@pytest.mark.parametrize("change,expected", [
    ({"score": None}, ":1: the label 'score' is None"), ({"score": 2}, "expected a number in"), ({"response": 1}, "'response'")])
def test_bad_labels(change, expected, tmp_path):
    with judge_server(honest) as server, pytest.raises(UserError, match=re.escape(expected)):
        run(write(tmp_path / "labels.jsonl", [trace(0) | {"score": 1.0} | change]), tmp_path / "result.json", server.url)


def pair(i, better=None, first="good 1", second="bad 22222", name="wildvision"):
    better = i % 2 if better is None else better
    texts = [first, second] if better == 0 else [second, first]
    return {"id": f"{name}-{i}", "query": f"What is {i}?", "response": texts, "image": [], "human_ranking": [better, 1 - better]}


def sections(body):
    text = prompt_text(body)
    return re.search(r"Response 1:\n(.*?)\n\nResponse 2:\n(.*?)\n\nCompare", text, re.DOTALL).groups()


def comparer(rule):
    return lambda h, body, number: h.reply(chat(f"Both say things, 1 and 2. <answer>{rule(*sections(body))}</answer>"))


PAIRS = [pair(i) for i in range(8)] + [pair(i, name="hallucination_pair") for i in range(4)] + [pair(i, name="mathverse") for i in range(2)]


@pytest.mark.parametrize("rule,accuracy,first,consistent", [
    (lambda a, b: 1 if "good" in a else 2, 1.0, 0.5, 1.0),
    (lambda a, b: 2 if "good" in a else 1, 0.0, 0.5, 1.0),
    (lambda a, b: 1, 0.0, 1.0, 0.0),
    (lambda a, b: 2, 0.0, 0.0, 0.0),
    (lambda a, b: "neither", None, None, None)])
def test_pairs_in_both_orders(rule, accuracy, first, consistent, tmp_path):
    with judge_server(comparer(rule)) as server:
        source = write(tmp_path / "pairs.jsonl", PAIRS)
        if accuracy is None:
            with pytest.raises(UserError, match="no pair could be decided"):
                run(source, tmp_path / "r.json", server.url, "vl-rewardbench", mode="compare")
            return
        found, _ = run(source, tmp_path / "r.json", server.url, "vl-rewardbench")
        assert found["mode"] == "compare" and found["count"] == 14 and found["accuracy"] == accuracy
        assert found["first_chosen"] == first and found["consistent"] == consistent
        assert found["accuracy_mean_of_orders"] == (0.5 if consistent == 0 else accuracy)
        assert {name: c["count"] for name, c in found["categories"].items()} == {"general": 8, "hallucination": 4, "reasoning": 2}


def test_a_judge_of_length_shows(tmp_path):
    with judge_server(comparer(lambda a, b: 1 if len(a) > len(b) else 2)) as server:
        found, _ = run(write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "r.json", server.url, "vl-rewardbench")
    assert found["longer_chosen"] == 1.0 and found["longer_better"] == 0.0 and found["accuracy"] == 0.0


def test_a_judge_that_scores_is_asked_about_each_response(tmp_path):
    def scorer(handler, body, number):
        text = prompt_text(body)
        handler.reply(chat("I give scores only" if "Response 2" in text else "0.9" if "good 1" in text else "0.2"))

    with judge_server(scorer) as server:
        found, _ = run(write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "r.json", server.url, "vl-rewardbench")
        assert found["mode"] == "score" and found["accuracy"] == 1.0
    with judge_server(lambda h, *_: h.reply(chat("0.5"))) as server, pytest.raises(UserError, match="every score is a tie"):
        run(tmp_path / "pairs.jsonl", tmp_path / "r.json", server.url, "vl-rewardbench", mode="score")


@pytest.mark.parametrize("text,value", [
    ("<answer>1</answer>", 0.0), ("2 is no good <answer> 2 </answer>", 1.0), ("Response 2 is better", 1.0), ("1", 0.0), ("2.", 1.0)])
def test_choices(text, value):
    assert choice(text).value == value


@pytest.mark.parametrize("text", ["", "0.2", "1.0", "0.1", "12", "<answer>1 or 2</answer>", "<answer>3</answer>", "first"])
def test_no_choice(text):
    assert math.isnan(choice(text).value)


def test_the_last_complete_block_is_found_in_linear_time():
    tagged = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
    for pieces in itertools.product(("<answer>", "</answer>", "1", " 2", "\n"), repeat=6):
        found = tagged.findall(text := "".join(pieces))
        assert pairs._last_block(text) == (found[-1] if found else None), text
    assert choice("<answer>" * 200_000 + "2").value == 1.0  # it simply has to come back


@pytest.mark.parametrize("change,expected", [
    ({"human_ranking": [0, 0]}, "human_ranking"), ({"response": ["a"]}, "a list of two texts"), ({"query": None}, "'query'")])
def test_bad_pairs(change, expected, tmp_path):
    with judge_server(honest) as server, pytest.raises(UserError, match=expected):
        run(write(tmp_path / "pairs.jsonl", [pair(0), pair(1) | change]), tmp_path / "r.json", server.url, "vl-rewardbench")


def test_the_commands_from_the_command_line(tmp_path, capsys):
    """annotate -> balance -> evaluate with nothing but the contract's options."""
    write(tmp_path / "traces.jsonl", [trace(i, (i % 11) / 10) for i in range(66)])
    write(tmp_path / "pairs.jsonl", PAIRS)
    with judge_server(honest) as server:
        judge = "--url", server.url, "--model", "judge"
        files = "--input", f"{tmp_path}/traces.jsonl", "--out", f"{tmp_path}/scored.jsonl"
        assert main(["reward", "annotate", *files, *judge, "--concurrency", "4", "--timeout", "5"]) == 0
        assert main(["reward", "balance", "--input", f"{tmp_path}/scored.jsonl", "--out", f"{tmp_path}/set"]) == 0
        assert main(["reward", "evaluate", "--input", f"{tmp_path}/set/labels.jsonl", *judge, "--out", f"{tmp_path}/result.json"]) == 0
    with judge_server(comparer(lambda a, b: 1 if "good" in a else 2)) as server:
        judge = "--url", server.url, "--model", "judge"
        assert main(["reward", "evaluate", "--input", f"{tmp_path}/pairs.jsonl", *judge, "--layout", "vl-rewardbench", "--out", f"{tmp_path}/pairs.json"]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["spearman"] == pytest.approx(1.0)
    assert json.loads((tmp_path / "pairs.json").read_text())["accuracy"] == 1.0
    assert "66 traces" in capsys.readouterr().out
    assert main(["reward", "balance", "--input", f"{tmp_path}/scored.jsonl", "--out", f"{tmp_path}/set"]) == 2
    assert main(["reward", "average", f"{tmp_path}/out", f"{tmp_path}/nowhere"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
