"""Labels of the thinking reward model's data are the rule's, and cannot be read off the question or the answer."""
import random
from collections import Counter
from pathlib import Path

from jinja2 import Template
from yaml import safe_load

from sophiavl_fast.data.demo import judge_data, soundness, traces
from tests.data.demo.conftest import asked, rows


def test_labels_are_the_rules_scores(demo):
    for name in ("judge_train", "judge_eval"):
        for row in rows(demo, name):
            score = soundness.check_trace(row, row["reasoning"]).score
            assert row["solution"] == f"<answer>{score:.1f}</answer>"
            assert (row["flavour"] == "sound") <= (row["solution"] == "<answer>1.0</answer>")


def test_the_prompt_is_the_packaged_template(demo):
    import sophiavl_fast

    file = safe_load((Path(sophiavl_fast.__file__).parent / "rewards/templates/demo_judge.yaml").read_text())
    assert file["system"] == ""
    for row in rows(demo, "judge_train")[:50]:
        question = row["problem"].split("\n" + row["reasoning"])[0]
        assert row["problem"] == Template(file["user"]).render(question=question, reasoning=row["reasoning"])
        assert "<answer>" not in row["problem"]


def test_the_question_is_worded_as_the_policy_sees_it(demo):
    from sophiavl_fast.data.dataset import Dataset

    dataset = Dataset.open("demo_train", demo / "dataset_info.json")
    for i, row in enumerate(rows(demo, "train")[:100]):
        example = dataset.example(i)
        asked = dataset.template.question(example.problem, problem_type=example.problem_type, options=example.options)
        assert judge_data.prompt_text(row, "8 5").startswith(asked + "\n8 5\n")


def test_some_corruptions_are_held_out(demo):
    trained = {row["flavour"] for row in rows(demo, "judge_train")}
    assert trained == {"sound", "slip", *judge_data.TRAINED}
    assert not judge_data.TRAINED.keys() & judge_data.HELD_OUT.keys()
    drawn = Counter(judge_data.draw(asked("sum", (8, 5, 4)), random.Random(i), held_out=True)[1] for i in range(500))
    assert drawn.keys() == {"sound", "slip", *judge_data.TRAINED, *judge_data.HELD_OUT}


def test_sound_and_flawed_traces_balance(demo):
    labels = Counter(row["solution"] for row in rows(demo, "judge_train"))
    assert 0.3 < labels["<answer>1.0</answer>"] / sum(labels.values()) < 0.55


def test_a_lucky_answer_does_not_move_the_score():
    question = asked("read", (8, 5, 4))
    row = {"kind": "read", "digits": [8, 5, 4]}
    slip, lucky = traces.slip(question), traces.lucky(question)
    assert soundness.check(row, slip.response) == soundness.check(row, lucky.response)
