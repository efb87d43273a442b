"""The whole room: outcome and thinking together, in every trust mode."""
import math
import threading

import pytest
import torch

from sophiavl_fast.config import Config, build
from sophiavl_fast.errors import UserError
from sophiavl_fast.rewards import Rewards
from tests.rewards.helpers import chat, group, honest, judge_server, prompt_text


def config(url="", **sections) -> Config:
    thinking = {"backend": "endpoint", "url": url, "model": "judge", "retries": 0} if url else {}
    return build({"thinking": thinking | sections.pop("thinking", {}), **sections})


def groups():
    return [group("numerical", "12", ["12", "13", "12"], reasonings=["quality 0.9", "quality 0.8", "quality 0.1"], name="d:1"),
            group("text", "a b c", ["a b c", "a x y", "q"], reasonings=["quality 0.5", "quality 0.6", "quality 0.7"], name="d:2")]


def test_without_a_judge():
    with Rewards(config(), device="cpu") as rewards:
        scores = rewards.score(groups())
    assert scores.thinking is None and scores.outcome[:3].tolist() == [1, 0, 1] and scores.seconds > 0


def test_every_response_is_judged_right_or_wrong():
    with judge_server(honest) as server, Rewards(config(server.url), device="cpu") as rewards:
        scores = rewards.score(groups())
        assert scores.thinking.tolist() == pytest.approx([0.9, 0.8, 0.1, 0.5, 0.6, 0.7]) and scores.thinking.dtype == torch.float32 and scores.reasons == {}
        assert len(server.bodies) == 6


def test_judging_begins_while_other_groups_are_sampled():
    asked = threading.Event()

    def judge(handler, body, number):
        asked.set()
        honest(handler, body, number)

    with judge_server(judge) as server, Rewards(config(server.url), device="cpu") as rewards:
        first, second = groups()
        rewards.start(first)
        assert asked.wait(20)
        assert rewards.score([first, second]).thinking.tolist() == pytest.approx([0.9, 0.8, 0.1, 0.5, 0.6, 0.7])
        assert rewards.score([second, first]).thinking.tolist() == pytest.approx([0.5, 0.6, 0.7, 0.9, 0.8, 0.1])
        assert len(server.bodies) == 12


def test_nothing_is_begun_after_its_end():
    with judge_server(honest) as server:
        with Rewards(config(server.url), device="cpu") as rewards:
            rewards.score(groups())
        rewards.start(groups()[0])      # a request of a step ahead that was still in flight
        assert len(server.bodies) == 6


def test_repo_mode_asks_only_about_what_the_public_code_asks_about():
    uniform = group("numerical", "12", ["12", "12"], reasonings=["quality 0.2"] * 2)
    with judge_server(honest) as server, Rewards(config(server.url, trust={"mode": "repo"}), device="cpu") as rewards:
        scores = rewards.score([*groups(), uniform])
        # rouge of 'a x y' against 'a b c' is 1/3, 0, 1/3: 0.22
        assert scores.thinking.tolist() == pytest.approx([0.9, 0, 0.1, 0.5, 0.6, 0, 0, 0])
        assert len(server.bodies) == 4


def test_a_broken_format_earns_nothing_and_is_judged_all_the_same():
    broken = group("numerical", "12", ["<think>quality 0.4</think> 12", "quality 0.3 cut off"], raw=True)
    with judge_server(honest) as server, Rewards(config(server.url), device="cpu") as rewards:
        scores = rewards.score([broken])
    assert scores.outcome.tolist() == [0, 0] and not scores.format_ok.any() and scores.thinking.tolist() == pytest.approx([0.4, 0.3])


def test_variance_mode_gets_several_scores():
    found = config(thinking={"backend": "off"})
    assert found.thinking.samples == 1
    with judge_server(lambda h, body, n: h.reply(chat(f"0.{body['seed'] % 10}"))) as server:
        def score():
            with Rewards(config(server.url, thinking={"samples": 3}, trust={"mode": "variance"}), device="cpu") as rewards:
                return rewards.score(groups()).thinking

        first = score()
        assert first.shape == (6, 3) and torch.equal(first, score()) and len(first.unique()) > 3


def test_grpo_asks_nobody():
    with judge_server(honest) as server, Rewards(config(server.url, algorithm={"name": "grpo"}), device="cpu") as rewards:
        assert rewards.score(groups()).thinking is None and server.bodies == []


def test_local_judge(tiny_judge):
    with Rewards(config(thinking={"backend": "local", "path": str(tiny_judge), "template": "demo_judge"}), device="cpu") as rewards:
        scores = rewards.score(groups())
    assert scores.thinking.shape == (6,) and scores.thinking.isnan().all() and set(scores.reasons) == set(range(6))  # a random model gives no scores


def test_both_reasons_of_a_row_are_kept():
    hard = group("numerical", "12", ["10^{10^{10^{10}}}"])
    with judge_server(lambda h, *_: h.reply(chat("?"))) as server, Rewards(config(server.url, rewards={"timeout_s": 1.0}), device="cpu") as rewards:
        scores = rewards.score([hard])
    assert scores.killed == 1 and "grader killed" in scores.reasons[0] and "judge's reply" in scores.reasons[0]


def test_template_without_a_place_for_the_answer():
    with pytest.raises(UserError, match="has no place for the answer"):
        Rewards(config("http://127.0.0.1:1/v1", thinking={"template": "demo_judge", "include_answer": True}), device="cpu")


# Bugs of the public code (methods.md 1.3, numbers as there) that this room must not have; 2 and 4 are tests/algorithms/test_published_bugs.py's,
# 12 to 14 tests/recipes/test_published_bugs.py's.

def test_bug_01_wrong_responses_are_scored_too():
    test_every_response_is_judged_right_or_wrong()


def test_bug_03_uniform_groups_are_scored():
    right = group("numerical", "12", ["12", "12"], reasonings=["quality 0.9", "quality 0.2"])
    wrong = group("numerical", "12", ["13", "14"], reasonings=["quality 0.8", "quality 0.1"])
    with judge_server(honest) as server, Rewards(config(server.url), device="cpu") as rewards:
        assert rewards.score([right, wrong]).thinking.tolist() == pytest.approx([0.9, 0.2, 0.8, 0.1])


@pytest.mark.parametrize("reply,score", [("0.75", 0.75), ("0.85", 0.85), ("0.95", 0.95), ("0.30", 0.3), ("1 error; score 0.3", 0.3), ("out of 1 is 0.4", None),
                                         ("**2 wrong steps**", None), ("no number", None), ("\\boxed{0.6}", 0.6)])
def test_bug_05_the_score_parser(reply, score):
    with judge_server(lambda h, *_: h.reply(chat(reply))) as server, Rewards(config(server.url), device="cpu") as rewards:
        scores = rewards.score([group("text", "a b c", ["a b c"])])
    found = scores.thinking.item()
    assert found == pytest.approx(score) if score is not None else math.isnan(found) and 0 in scores.reasons


def test_bug_06_the_client_is_concurrent_authorised_and_never_turns_failure_into_zero(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-6")
    together = threading.Barrier(6, timeout=20)

    def judge(handler, body, number):
        together.wait()  # passes only when six calls are under way at once
        handler.reply("gone", 500) if "0.1" in prompt_text(body).rpartition("quality")[2] else honest(handler, body, number)

    with judge_server(judge) as server, Rewards(config(server.url), device="cpu") as rewards:
        found = rewards.score(groups()).thinking.tolist()
        assert all(h["Authorization"] == "Bearer sk-6" for h in server.headers)
    assert math.isnan(found[2]) and [x for i, x in enumerate(found) if i != 2] == pytest.approx([0.9, 0.8, 0.5, 0.6, 0.7])


def test_bug_07_all_images_and_the_bare_reasoning_are_sent():
    from PIL import Image

    pictures = tuple(Image.new("RGB", (28, 28)) for _ in range(3))
    shown = group("numerical", "12", ["12"], reasonings=["quality 0.5"], images=pictures)
    with judge_server(honest) as server, Rewards(config(server.url), device="cpu") as rewards:
        rewards.score([shown])
        content = server.bodies[0]["messages"][-1]["content"]
    assert [part["type"] for part in content] == ["image_url"] * 3 + ["text"]
    assert "quality 0.5" in content[-1]["text"] and "What is it?" in content[-1]["text"]
    assert not any(word in content[-1]["text"] for word in ("<think>", "<answer>12", "<|im_start|>"))


@pytest.mark.parametrize("answer,gold,right", [("A, B", "A,B", 1), ("A.", "A", 1), ("(A)", "A", 1), ("A,A", "AB", 0), ("", "A", 0)])
def test_bug_08_choices(answer, gold, right):
    with Rewards(config(), device="cpu") as rewards:
        assert rewards.score([group("multiple_choice", gold, [answer], options=("A. x", "B. y"))]).outcome.tolist() == [right]


def test_bug_09_an_empty_reference_has_an_error_rate():
    with Rewards(config(), device="cpu") as rewards:
        assert rewards.score([group("ocr", "", ["", "two words"])]).outcome.tolist() == pytest.approx([1, math.exp(-2)])


def test_bug_10_a_response_alone_is_scored_as_in_company():
    """Its branch for single samples names variables that do not exist."""
    together = groups()
    alone = [group(g.prompt.problem_type, g.prompt.gold, [r.text], raw=True, name=g.prompt.id) for g in together for r in g.responses]
    with judge_server(honest) as server, Rewards(config(server.url), device="cpu") as rewards:
        one, all_ = rewards.score(alone), rewards.score(together)
    assert torch.equal(one.outcome, all_.outcome) and torch.equal(one.thinking, all_.thinking) and torch.equal(one.format_ok, all_.format_ok)


def test_bug_11_nothing_is_printed_and_an_unknown_type_is_one_line(capfd):
    with Rewards(config(), device="cpu") as rewards:
        rewards.score(groups())
        with pytest.raises(UserError, match="problem_type '' has no grader; valid: free_form, multiple_choice, numerical, ocr, text"):
            rewards.score([group("", "12", ["12"])])
    assert capfd.readouterr() == ("", "")
