"""What a recipe refuses before it loads anything, and how a rollout batch is cut into mini-batches."""
import pytest
import torch

from sophiavl_fast.config import Config
from sophiavl_fast.errors import UserError
from sophiavl_fast.recipes import setup
from sophiavl_fast.types import Group, Prompt, Response


def conf(**sections) -> Config:
    return Config.model_validate({"model": {"path": "m"}, "data": {"train": "d"}} | sections)


def test_a_run_dir_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=rf"run.dir = '{place}' cannot be made: (File exists|Not a directory)"):
            setup.resume_point(conf(run={"dir": str(place)}))
    assert setup.resume_point(conf(run={"dir": str(tmp_path / "new" / "run")})) is None and (tmp_path / "new" / "run").is_dir()


def test_a_judge_that_is_not_there_is_named_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match=r"thinking.path = '.*none' is no model folder"):
        setup.refuse_missing_judge(conf(thinking={"backend": "local", "path": str(tmp_path / "none")}))
    with pytest.raises(UserError, match=r"thinking.template 'demo_jugde'.*did you mean 'demo_judge'"):
        setup.refuse_missing_judge(conf(thinking={"backend": "endpoint", "url": "http://h", "model": "m", "template": "demo_jugde"}))
    setup.refuse_missing_judge(conf(thinking={"backend": "local", "path": "none"}, algorithm={"name": "grpo"}))
    setup.refuse_missing_judge(conf(thinking={"path": "none", "template": "none"}))


def batch(names: range) -> tuple[list[Group], torch.Tensor]:
    """A group of 1 to 3 responses a name, each response's advantage telling whose it is."""
    groups = []
    for name in names:
        prompt = Prompt(id=str(name), dataset="d", problem_type="text", question="", gold="")
        answer = Response(token_ids=[1], logprobs=[0.0], text="", finish_reason="stop", seed=0, weight_versions=[0])
        groups.append(Group(prompt=prompt, responses=[answer] * (1 + name % 3)))
    return groups, torch.tensor([float(g.prompt.id) for g in groups for _ in g.responses])


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_mini_batch_is_of_the_same_prompts_on_any_number_of_replicas(replicas):
    """A replica holds a run of the step's 12 prompts (loader.Loader.next)."""
    shares = [setup.split(*batch(range(12 * r // replicas, 12 * (r + 1) // replicas)), 2) for r in range(replicas)]
    for part in range(2):
        assert sorted(int(g.prompt.id) for share in shares for g in share[part][0]) == list(range(part, 12, 2))
        for groups, rows in (share[part] for share in shares):
            assert rows.tolist() == [float(g.prompt.id) for g in groups for _ in g.responses]
    with pytest.raises(UserError, match=r"12 groups of a replica do not divide into algorithm.mini_batches = 5"):
        setup.split(*batch(range(12)), 5)
    assert setup.split([], None, 2) == [([], None)] * 2
