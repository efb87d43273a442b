"""Supervised fine-tuning: what it learns, a resumed run, and targets that are distributions."""
import json
import subprocess
import sys

import pytest
import torch

from sophiavl_fast import config
from sophiavl_fast.config import Sft, Thinking
from sophiavl_fast.data.processor import Processor
from sophiavl_fast.errors import UserError
from sophiavl_fast.recipes import sft
from sophiavl_fast.rewards.thinking import Case, template
from sophiavl_fast.rewards.thinking.local import LocalJudge
from sophiavl_fast.types import Prompt

LABELS = {"1+2=3": 0.25, "2+2=5\n5+1=6": 0.83, "7": 1.0, "9 9 9": 0.07}
TIMES = ("time/", "train/tokens_per_s", "mem/")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from sophiavl_fast.data.demo import tiny_model

    folder = tmp_path_factory.mktemp("sft") / "init"
    tiny_model.build(folder, 5)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four prompts of a judge as `reward balance` writes them: the solution rounded to a tenth, the exact score beside it."""
    folder, judge = tmp_path_factory.mktemp("data"), template.load("demo_judge")
    rows = [{"problem_id": str(i), "problem": judge.user("sum?", reasoning, ""), "data_type": "text", "problem_type": "numerical", "options": [], "process": "",
             "solution": f"<answer>{label + 1e-9:.1f}</answer>", "path": [], "data_source": "test", "score": label}
            for i, (reasoning, label) in enumerate(LABELS.items())]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompt.yaml").write_text('system: ""\nquestion: "{{ problem }}"\nuser: "{{ question }}"\n')
    (folder / "dataset_info.json").write_text(json.dumps({"labels": {"file_path": "labels.jsonl", "template": "prompt.yaml"}}))
    return folder


def train(model, data, out, *more: str) -> list[dict]:
    settings = ["device=cpu", "model.dtype=float32", f"model.path={model}", f"data.registry={data}/dataset_info.json", "data.train=labels", f"run.dir={out}",
                "run.steps=80", "sft.target=solution", "sft.batch_size=4", "optim.lr=3e-3", "optim.warmup_steps=5", "data.max_prompt_tokens=128",
                "rollout.max_new_tokens=8", "checkpoint.every=0", "monitor.tensorboard=false", *more]
    (out.parent / "sft.yaml").write_text("recipe: sft\n")
    assert sft.train(config.load(out.parent / "sft.yaml", settings)) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


def judged(folder) -> list[float]:
    judge = LocalJudge(Thinking(backend="local", path=str(folder), template="demo_judge"), template.load("demo_judge"), torch.device("cpu"))
    [verdicts] = judge.collect([judge.submit(Case("sum?", [], list(LABELS), [""] * len(LABELS), [[0]] * len(LABELS)))])
    return [verdict.values[0] for verdict in verdicts]


def test_a_soft_target_teaches_the_exact_score_and_a_hard_one_its_rounding(model, data, tmp_path):
    soft = train(model, data, tmp_path / "soft", "sft.soft_score=score")
    train(model, data, tmp_path / "hard")
    labels = list(LABELS.values())
    assert soft[-1]["loss"] < 0.3 * soft[0]["loss"]
    assert judged(tmp_path / "soft" / "hf") == pytest.approx(labels, abs=0.015)
    assert judged(tmp_path / "hard" / "hf") == pytest.approx([0.3, 0.8, 1.0, 0.1], abs=0.015)


def test_a_resumed_run_equals_the_whole_one(model, data, tmp_path):
    whole = train(model, data, tmp_path / "whole", "run.steps=4", "checkpoint.every=2", "sft.soft_score=score", "sft.batch_size=3")
    resumed = train(model, data, tmp_path / "resumed", "run.steps=4", "sft.soft_score=score", "sft.batch_size=3",
                    f"run.resume={tmp_path}/whole/checkpoints/step_2")
    untimed = lambda rows: [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]
    assert [row["step"] for row in resumed] == [3, 4]
    assert untimed(resumed) == untimed(whole[2:])


def test_records_that_any_replica_skipped_are_counted(model, data, tmp_path):
    """As many as one replica meets, which draws the same stream; and a resumed run counts on."""
    rows = [json.loads(line) for line in (data / "labels.jsonl").read_text().splitlines()]
    flawed = [row | {"problem_id": str(i), "solution": "" if i % 3 == 2 else row["solution"]} for i, row in enumerate(rows * 2)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flawed))
    for name in ("dataset_info.json", "prompt.yaml"):
        (tmp_path / name).write_text((data / name).read_text())
    more = ["run.steps=3", "data.on_error=skip", "checkpoint.every=2"]
    alone = [row["data/skipped"] for row in train(model, tmp_path, tmp_path / "alone", *more)]
    settings = (tmp_path / "alone/config.yaml").read_text().replace(str(tmp_path / "alone"), str(tmp_path / "two"))
    (tmp_path / "two.yaml").write_text(settings)
    for resume in ([], [f"run.resume={tmp_path}/two/checkpoints/step_2"]):
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sophiavl_fast",
                               "train", f"{tmp_path}/two.yaml", "checkpoint.keep=5", *resume], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        assert [json.loads(line)["data/skipped"] for line in (tmp_path / "two/metrics.jsonl").open()] == alone
    assert 0 < alone[0] < alone[2]


@pytest.mark.parametrize("score, wanted", [
    (0.25, [("0.2", 0.5), ("0.3", 0.5)]), (0.3, [("0.3", 1.0)]), (0.0, [("0.0", 1.0)]), (1, [("1.0", 1.0)]), (0.97, [("0.9", 0.3), ("1.0", 0.7)]),
    (0.7, [("0.7", 1.0)]), (0.6, [("0.6", 1.0)]),
])
def test_the_nearest_tenths_have_the_score_as_their_mean(score, wanted):
    found = sft.tenths(Prompt(id="d:1", dataset="d", problem_type="numerical", question="", gold=f"{score:.1f}", record={"score": score}), "score")
    assert [text for text, _ in found] == [text for text, _ in wanted]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in wanted], abs=1e-6)
    assert sum(float(text) * weight for text, weight in found) == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize("record, gold, line", [
    ({}, "0.3", "record d:1: 'score' is None, but sft.soft_score = score wants a number in [0, 1] there"),
    ({"score": "0.3"}, "0.3", "record d:1: 'score' is '0.3', but sft.soft_score = score wants a number in [0, 1] there"),
    ({"score": True}, "1.0", "record d:1: 'score' is True, but sft.soft_score = score wants a number in [0, 1] there"),
    ({"score": float("nan")}, "0.3", "record d:1: 'score' is nan, but sft.soft_score = score wants a number in [0, 1] there"),
    ({"score": 0.7}, "0.3", "record d:1: its solution is '0.3' but its 'score' is 0.7: no rounding makes one of the other"),
    ({"score": 0.7}, "B", "record d:1: its solution is 'B' but its 'score' is 0.7: no rounding makes one of the other"),
])
def test_a_record_without_an_exact_score_is_named(record, gold, line):
    with pytest.raises(UserError) as found:
        sft.tenths(Prompt(id="d:1", dataset="d", problem_type="numerical", question="", gold=gold, record=record), "score")
    assert str(found.value) == line


def test_targets(model):
    processor = Processor(str(model))
    prompt = Prompt(id="d:1", dataset="d", problem_type="numerical", question="", gold="0.3", process="why\n", record={"score": 0.34})
    texts = lambda **options: [r.text for r in sft.example(prompt, processor, Sft(**options)).group.responses]
    assert texts() == ["why\n<answer>0.3</answer>"]
    assert texts(target="answer") == ["<answer>0.3</answer>"]
    assert texts(target="solution") == ["0.3"]
    assert texts(soft_score="score") == ["why\n<answer>0.3</answer>", "why\n<answer>0.4</answer>"]
    assert sft.example(prompt, processor, Sft(soft_score="score")).weights == pytest.approx([0.6, 0.4])
    assert all(r.token_ids[-1] == processor.stop_ids[0] for r in sft.example(prompt, processor, Sft()).group.responses)
    prompt.process = ""
    with pytest.raises(UserError, match=r"record d:1 has no 'process' to learn from; use sft.target=solution"):
        sft.example(prompt, processor, Sft())
