"""Recorded rollouts: a folder holds one run's, and what cannot be read is one line. A replay stands in for the engine that is recorded."""
import json
import re

import pytest

from sophiavl_fast import config as tree
from sophiavl_fast.errors import UserError
from sophiavl_fast.rollout.saved import Recorder, Replay, refuse_unusable
from sophiavl_fast.types import Prompt


def conf(run_dir, steps=1, **debug):
    return tree.build({"run": {"dir": str(run_dir), "steps": steps}, "debug": {key: str(value) for key, value in debug.items()}})


def line(name: str, token: int) -> str:
    response = {"token_ids": [token, 2], "logprobs": [-0.1, -1 / 3], "text": "x", "finish_reason": "stop", "seed": 1, "weight_versions": [0, 0]}
    return json.dumps({"id": name, "responses": [response]}) + "\n"


def write(folder, **files: str):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name.replace('__', '-')}.jsonl").write_text(text)
    return folder


def prompts(names: str) -> list[Prompt]:
    return [Prompt(id=name, dataset="d", problem_type="text", question="", gold="") for name in names]


def tokens(engine, names: str, step: int) -> list[int]:
    groups = engine.generate(prompts(names), n=1, step=step, seed=0, temperature=1.0, max_new_tokens=2)
    return [g.responses[0].token_ids[0] for g in groups]


def test_what_is_recorded_is_what_is_replayed(tmp_path):
    source = write(tmp_path / "source", step_1__0=line("a", 5) + line("b", 6), step_1__1=line("c", 7))
    for replica, names in enumerate(("ab", "c")):
        tokens(Recorder(Replay(source), tmp_path / "kept", replica, 2), names, step=1)
    assert tokens(Replay(tmp_path / "kept"), "cab", step=1) == [7, 5, 6]
    assert (tmp_path / "kept" / "step_1-0.jsonl").read_text() == (source / "step_1-0.jsonl").read_text()


def test_a_folder_that_was_used_before_holds_the_later_run_alone(tmp_path):
    """An older run of three replicas and five steps; one of two replicas goes on after step 1, and its replicas are never at the same step."""
    source = write(tmp_path / "source", **{f"step_{step}__0": line("a", step) + line("b", 10 + step) for step in range(1, 6)})
    kept = write(tmp_path / "kept", **{f"step_{step}__{replica}": line("ab?"[replica], 90) for step in range(1, 6) for replica in range(3)})
    (kept / "notes.jsonl").write_text("mine")
    first, second = (Recorder(Replay(source), kept, replica, 2) for replica in (0, 1))
    tokens(second, "b", step=2)
    tokens(second, "b", step=3)
    tokens(first, "a", step=2)
    assert sorted(f.name for f in kept.iterdir()) == ["notes.jsonl", *(f"step_1-{r}.jsonl" for r in range(3)), "step_2-0.jsonl", "step_2-1.jsonl",
                                                      "step_3-1.jsonl"]
    tokens(first, "a", step=3)
    assert [tokens(Replay(kept), "ab", step) for step in (2, 3)] == [[2, 12], [3, 13]]


def test_greedy_answers_are_not_recorded_and_spoil_nothing(tmp_path):
    source, kept = write(tmp_path / "source", step_0__0=line("a", 5)), write(tmp_path / "kept", step_1__0=line("a", 6))
    tokens(Recorder(Replay(source), kept, 0), "a", step=0)
    assert [f.name for f in kept.iterdir()] == ["step_1-0.jsonl"]


@pytest.mark.parametrize("files,message", [
    ({"step_1__0": line("a", 5) + line("b", 6)[:-40]}, r"step_1-0.jsonl:2 is no recorded prompt \(JSONDecodeError.*record the step anew"),
    ({"step_1__0": '{"id": "a"}\n'}, r"step_1-0.jsonl:1 is no recorded prompt \(KeyError: 'responses'"),
    ({"step_1__0": '[]\n'}, "step_1-0.jsonl:1 is no recorded prompt"),
    ({"step_1__0": '{"id": "a", "responses": [{"text": ""}]}\n'}, "step_1-0.jsonl:1 is no recorded prompt .TypeError"),
    ({"step_1__0": line("a", 5), "step_1__1": line("a", 6)}, r"step_1-1.jsonl:1 answers prompt 'a' of step 1 a second time and differently"),
    ({"step_2__0": line("a", 5)}, "step 1 was not recorded"), ({"step_1__0": line("b", 5)}, "step 1 has no response to prompt 'a' instead of 1"),
    ({"step_1__0": ""}, "step 1 has no response to prompt 'a'"),
])
def test_a_recording_that_cannot_be_read_is_one_line(tmp_path, files, message):
    with pytest.raises(UserError, match=f"^debug.replay = '{re.escape(str(write(tmp_path / 'kept', **files)))}': [^\\n]*{message}[^\\n]*$"):
        tokens(Replay(tmp_path / "kept"), "a", step=1)


def test_bytes_that_are_no_text_are_one_line(tmp_path):
    (write(tmp_path / "kept") / "step_1-0.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match=r"step_1-0.jsonl cannot be read"):
        tokens(Replay(tmp_path / "kept"), "a", step=1)


def test_a_prompt_that_a_step_drew_twice_is_replayed_twice(tmp_path):
    """Seeds are of step and prompt, so that both have the same answers, on whichever replica."""
    kept = write(tmp_path / "kept", step_1__0=line("a", 5) + line("b", 6) + line("a", 5), step_1__1=line("b", 6))
    assert tokens(Replay(kept), "abab", step=1) == [5, 6, 5, 6]


def test_folders_are_refused_before_anything_starts(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(UserError, match=rf"^debug.record = '{place}' cannot be made: (File exists|Not a directory); name a folder$"):
            refuse_unusable(conf(tmp_path / "run", record=place), None)
        with pytest.raises(UserError, match=rf"^debug.replay = '{place}' holds no recorded step"):
            refuse_unusable(conf(tmp_path / "run", replay=place), None)
    refuse_unusable(conf(tmp_path / "run", record=tmp_path / "new", replay=write(tmp_path / "kept", step_1__0="")), None)
    refuse_unusable(conf(tmp_path / "run"), None)
    assert (tmp_path / "new").is_dir()


def test_a_new_run_leaves_the_recording_of_another_alone(tmp_path, monkeypatch):
    """A resumed one goes on in its own, and so does one that is started again before it had a checkpoint, however it spells the folder."""
    run_dir, kept = tmp_path / "run", write(tmp_path / "kept", step_2__0="", step_10__1="", step_x="")
    said = rf"^debug.record = '{kept}' holds another run's recording \(steps 2 to 10\), .* name another folder, or remove it first$"
    with pytest.raises(UserError, match=said):
        refuse_unusable(conf(run_dir, record=kept), None)
    refuse_unusable(conf(run_dir, record=kept), 10)   # goes on after it
    with pytest.raises(UserError, match=rf"^debug.record = '{kept}' holds another run's recording \(step 10\), "):
        refuse_unusable(conf(run_dir, record=kept), 4)
    run_dir.mkdir()
    for text in (tree.dump(conf(run_dir)), tree.dump(conf(run_dir, record=tmp_path)), "debug: [", "debug: 1", "[]", "\0"):
        (run_dir / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=said):
            refuse_unusable(conf(run_dir, record=kept), None)
    (run_dir / "config.yaml").write_text(tree.dump(conf(run_dir, record=kept)))
    monkeypatch.chdir(tmp_path)
    refuse_unusable(conf("run", record="kept"), None)
    refuse_unusable(conf("run", record="kept"), 4)
    assert sorted(f.name for f in kept.iterdir()) == ["step_10-1.jsonl", "step_2-0.jsonl", "step_x.jsonl"]
    (kept / "step_2-0.jsonl").unlink()
    (kept / "step_10-1.jsonl").unlink()
    refuse_unusable(conf(tmp_path / "third", record=kept), None)


def test_a_replay_must_hold_every_step_of_the_run(tmp_path):
    kept = write(tmp_path / "kept", **{f"step_{step}__0": "" for step in (1, 2, 3, 5)})
    go = lambda steps, done=None: refuse_unusable(conf(tmp_path / "run", steps, replay=kept), done)
    go(3)
    go(5, 4)
    go(3, 3)   # nothing is left to replay
    for steps, done, said in ((6, 4, "step 6 was not recorded, the last one is 5; set run.steps=5"), (9, None, "step 4 was not recorded, the last one is 5; "
                              "set run.steps=3"), (9, 6, "step 7 was not recorded, the last one is 5; replay a folder that holds steps 7 to 9"),
                              (4, 3, "step 4 was not recorded, the last one is 5; replay a folder that holds step 4")):
        with pytest.raises(UserError, match=f"^debug.replay = '{re.escape(str(kept))}': {said}$"):
            go(steps, done)
