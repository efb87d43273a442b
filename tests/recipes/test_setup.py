"""What a recipe refuses before it loads anything, and how a rollout batch is cut into mini-batches."""
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from sophiavl_fast.config import Config
from sophiavl_fast.data.demo import generate
from sophiavl_fast.errors import UserError
from sophiavl_fast.policy import checkpoint
from sophiavl_fast.policy.families import open_family
from sophiavl_fast.recipes import ranks, rl, setup, sft
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


def test_a_judge_whose_weights_are_cut_short_is_named_too(model, tmp_path):
    judge = shutil.copytree(model, tmp_path / "judge")
    here = conf(thinking={"backend": "local", "path": str(judge), "template": "demo_judge"})
    setup.refuse_missing_judge(here)
    weights = judge / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match=rf"^thinking.path = '{judge}': 'model.safetensors' is cut short"):
        setup.refuse_missing_judge(here)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from sophiavl_fast.data.demo import tiny_model

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model.build(folder, 0)
    return folder


def checkpoint_of(model, run, step, **state):
    """A checkpoint's manifest and an empty part, as they lie on disk."""
    config = Config.model_validate({"model": {"path": str(model)}})
    folder = run / "checkpoints" / f"step_{step}"
    folder.mkdir(parents=True)
    save_file({"rng/cpu": torch.zeros(1)}, str(folder / "part-0-0.safetensors"))
    whole = {"step": step, "total_steps": 9, "seed": 3, "loader": {}, "config": config.model_dump()} | state
    (folder / "manifest.json").write_text(json.dumps({
        "step": step, "updates": step, "identity": checkpoint.identity(config, open_family(model)), "tensors": {"rng/cpu": "part-0-0.safetensors"},
        "state": {k: v for k, v in whole.items() if v is not None}}))
    return folder


def test_the_checkpoint_to_go_on_from_is_looked_at_before_anything_is_loaded(model, tmp_path):
    go = lambda seed=3, **keys: setup.resume_point(conf(run={"dir": str(tmp_path), "seed": seed}, model={"path": str(model)} | keys))
    checkpoint_of(model, tmp_path, 1)
    newest = checkpoint_of(model, tmp_path, 2)
    assert go() == newest
    with pytest.raises(UserError, match=rf"run.seed = 5, but checkpoint '{newest}' was made with 3; set run.seed=3"):
        go(5)
    with pytest.raises(UserError, match=r"model.freeze_vision is False there, True here; set model.freeze_vision=false"):
        go(freeze_vision=True)
    other = shutil.copytree(model, tmp_path / "other")
    tree = json.loads((other / "config.json").read_text())
    tree["text_config"]["rope_parameters"]["rope_theta"] *= 2
    (other / "config.json").write_text(json.dumps(tree))
    (other / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=rf"is of another model: text_config.*.rope_theta is .*; resume with the run's own model.path = '{model}'"):
        go(path=str(other))
    (newest / "part-0-0.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"'part-0-0.safetensors' is cut short .*; another one is '.*step_1'"):
        go()
    foreign = checkpoint_of(model, tmp_path, 3, seed=None, config=None)
    with pytest.raises(UserError, match=rf"checkpoint '{foreign}' was not written by `train`: its state lacks seed, config"):
        go()


@pytest.mark.parametrize("change,said", [
    ({"train": "a,c"}, r"datasets = \['a', 'b'\], this run has \['a', 'c'\]"), ({"train": {"a": 1.0, "b": 2.0}}, r"weights = None, this run has \[1.0, 2.0\]"),
    ({"shuffle": False}, "shuffle = True, this run has False"), ({}, None)], ids=str)
def test_a_checkpoint_of_other_data_is_refused_before_anything_is_loaded(model, tmp_path, change, said):
    """By its manifest; what only the records tell, before the weights are (test_other_data_are_refused_before_the_weights)."""
    found = checkpoint_of(model, tmp_path, 1, loader={"cursor": 4, "skipped": 0, "seed": 3, "shuffle": True, "datasets": [["a", 7], ["b", 5]], "weights": None})
    go = lambda: setup.resume_point(conf(run={"dir": str(tmp_path), "seed": 3}, model={"path": str(model)}, data={"train": "a,b"} | change))
    if said is None:
        assert go() == found
        return
    with pytest.raises(UserError, match=f"^the checkpoint's data stream had {said}; restore it or start a new run.dir$"):
        go()


def test_the_steps_of_a_curriculum_are_part_of_its_stream(model, tmp_path):
    mix = {"a": {0: 1.0, 9: 0.0}, "b": 1.0}
    go = lambda per_step: setup.resume_point(conf(run={"dir": str(tmp_path), "seed": 3}, model={"path": str(model)}, data={"train": mix},
                                                  rollout={"prompts_per_step": per_step}))
    found = checkpoint_of(model, tmp_path, 1, loader={"datasets": [["a", 7], ["b", 5]], "weights": [[[0, 1.0], [9, 0.0]], 1.0], "prompts_per_step": 8})
    assert go(8) == found
    with pytest.raises(UserError, match="had prompts_per_step = 8, this run has 4;"):
        go(4)


@pytest.mark.parametrize("recipe,name", [(rl, "demo_train"), (sft, "demo_warmup")], ids=["rl", "sft"])
def test_other_data_are_refused_before_the_weights(model, tmp_path, monkeypatch, recipe, name):
    """Records that were added are seen as the stream opens."""
    generate.write(tmp_path / "data", 3, lambda rows, label, total: rows, scale=0.02)
    checkpoint_of(model, tmp_path, 1, loader={"cursor": 4, "skipped": 0, "seed": 3, "shuffle": True, "datasets": [[name, 1]], "weights": None})
    config = conf(recipe=recipe.__name__.rpartition(".")[2], device="cpu", run={"dir": str(tmp_path), "seed": 3}, model={"path": str(model)},
                  thinking={"backend": "off"}, rollout={"max_new_tokens": 32},
                  data={"train": name, "registry": str(tmp_path / "data/dataset_info.json"), "templates": "plain"})
    monkeypatch.setattr(recipe.Policy, "create", lambda *_, **__: pytest.fail("the weights were loaded"))
    with pytest.raises(UserError, match=rf"had datasets = \[\['{name}', 1\]\]"):
        recipe.train(config)


def test_a_new_run_is_not_begun_over_an_older_ones_checkpoints(model, tmp_path):
    """Whose later steps would be taken for its own by retention, and by the next run.resume=auto."""
    new = conf(run={"dir": str(tmp_path), "resume": "never"}, model={"path": str(model)})
    assert setup.resume_point(new) is None
    checkpoint_of(model, tmp_path, 9)
    with pytest.raises(UserError, match=f"run.dir '{tmp_path}' holds a run already; use run.resume=auto to go on or another run.dir"):
        setup.resume_point(new)


def test_checkpoints_beyond_the_one_to_go_on_from_are_set_aside(model, tmp_path, capsys):
    """As after run.resume=.../step_1 while later ones lie there: a kill then, and run.resume=auto must not take up the course that was left."""
    here = {"run": {"dir": str(tmp_path), "seed": 3}, "model": {"path": str(model)}, "monitor": {"tensorboard": False}}
    for step in (1, 2, 3):
        checkpoint_of(model, tmp_path, step)
    (tmp_path / "checkpoints" / ".step_4.replaced").mkdir()     # a save anew that was killed: complete too
    shutil.copy(tmp_path / "checkpoints/step_3/manifest.json", tmp_path / "checkpoints/.step_4.replaced")
    (tmp_path / "checkpoints" / "abandoned_step_3").mkdir()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)))
    found = setup.resume_point(conf(**here | {"run": {"dir": str(tmp_path), "seed": 3, "resume": str(tmp_path / "checkpoints/step_1")}}))
    ranks.open_log(tmp_path, conf(**here), setup.read_state(found)["step"], found).close()
    said = capsys.readouterr().err
    assert "going on from step 1" in said and "abandoned_step_2, abandoned_step_3-2, abandoned_step_4" in said and said.count("\n") == 1
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert setup.resume_point(conf(**here)) == found
    back = tmp_path / "checkpoints/abandoned_step_2"
    assert setup.resume_point(conf(**here | {"run": {"dir": str(tmp_path), "seed": 3, "resume": str(back)}})) == back
    ranks.open_log(tmp_path, conf(**here), 1, found).close()
    assert not capsys.readouterr().err
    # back on the course that was left, when the new one has a checkpoint of the same step
    checkpoint_of(model, tmp_path, 2)
    ranks.open_log(tmp_path, conf(**here), 2, back).close()
    assert "set aside as abandoned_step_2-2;" in capsys.readouterr().err and back.is_dir() and not (tmp_path / "checkpoints/step_2").exists()


def test_the_steps_left(model, tmp_path):
    found = checkpoint_of(model, tmp_path, 5)
    assert [setup.steps_left(conf(run={"steps": steps}), found) for steps in (4, 5, 7)] == [0, 0, 2]
    assert setup.steps_left(conf(run={"steps": 4}), None) == 4


def test_what_cannot_be_read_is_refused_before_anything_is_loaded(model, tmp_path):
    good = {"model": {"path": str(model)}, "thinking": {"backend": "off"}}
    setup.refuse_unreadable(conf(**good))
    cut = shutil.copytree(model, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-9])
    for recipe in ("rl", "sft"):
        with pytest.raises(UserError, match=rf"model.path = '{cut}': 'model.safetensors' is cut short"):
            setup.refuse_unreadable(conf(**good | {"model": {"path": str(cut)}, "recipe": recipe}))
    with pytest.raises(UserError, match=rf"model.path = '{tmp_path}/cuts' is no model folder .no config.json.; did you mean '{cut}'"):
        setup.refuse_unreadable(conf(model={"path": f"{tmp_path}/cuts"}))
    with pytest.raises(UserError, match=r"debug.replay = '.*nowhere' holds no recorded step"):
        setup.refuse_unreadable(conf(**good, debug={"replay": str(tmp_path / "nowhere")}))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "step_1-0.jsonl").touch()
    recording = conf(**good, debug={"record": str(tmp_path / "kept")})
    with pytest.raises(UserError, match=r"debug.record = '.*kept' holds another run's recording \(step 1\)"):
        setup.refuse_unreadable(recording)
    setup.refuse_unreadable(recording, checkpoint_of(model, tmp_path / "run", 1))
    setup.refuse_unreadable(conf(**good, debug={"record": str(tmp_path / "kept")}, recipe="sft"))
    with pytest.raises(UserError, match=r"thinking.path = '.*none' is no model folder"):
        setup.refuse_unreadable(conf(**good | {"thinking": {"backend": "local", "path": str(tmp_path / "none")}}))


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
