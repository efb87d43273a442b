"""`scripts/verify_node.sh --dry-run`: what a user with eight GPUs runs, here over gloo with two processes."""
import json
import subprocess

import pytest

from benchmarks import verify_node
from tests.recipes.conftest import ROOT

GOOD = {"parity": {"policy_hf_max": 1e-5, "policy_engine_max": 1e-5}, "transfer": {"bytes": 8e6, "seconds": 0.1}, "restarts": 0,
        "rollout_tokens_per_s": 1.0, "train_tokens_per_s": 1.0}


@pytest.mark.parametrize("change, greedy, expected", [
    ({}, 1.0, []),
    ({"parity": {"policy_hf_max": 1e-3, "policy_engine_max": 1e-5}}, 1.0, ["gloo: policy_hf_max = 0.001, limit 0.0001"]),
    ({"parity": {"policy_hf_max": 1e-5, "policy_engine_max": float("nan")}}, 1.0, ["gloo: policy_engine_max = nan, limit 0.0001"]),
    ({"restarts": 1}, 1.0, ["gloo: engines were restarted 1 times"]),
    ({"transfer": {"bytes": 0.0, "seconds": 0.1}}, 1.0, ["gloo: no bytes were transferred"]),
    ({}, 0.9, ["greedy answers agree on 90% of the prompts, limit 100%"])], ids=str)
def test_what_fails_is_said(change, greedy, expected):
    found = {"runs": {"gloo": GOOD | change}, "greedy_match": greedy, "limits": verify_node.LIMITS["float32"], "seconds": 1.0}
    assert verify_node.failures(found) == expected
    assert verify_node.table(found | {"failures": expected}).endswith("; ".join(expected) or "passed")


def loaded(plan, processes, settings):
    from sophiavl_fast import config

    return config.load(ROOT / "configs" / "demo.yaml", ["thinking.backend=off", f"model.dtype={plan.dtype}", *plan.shared, *settings], world_size=processes)


@pytest.mark.parametrize("keys", [2, 4, 8])
def test_the_plans_of_a_node(keys):
    """Half of the GPUs for engines, each its own; nothing that the config would refuse, nor a model of so many key heads."""
    from sophiavl_fast.config_checks import check_start

    for gpus in (2, 4, 6, 8, 10, 12, 16):
        plan = verify_node.gpu_plan(gpus, 4, keys)
        for processes, settings in plan.runs.values():
            tree = loaded(plan, processes, settings)
            check_start(tree, {})
            assert not set(tree.rollout.gpus) & set(range(processes)) and len(tree.rollout.gpus) in (0, gpus - processes)
            assert keys % tree.parallel.tensor == 0


def test_a_node_of_80_gb_holds_7b(tmp_path):
    """The example of the script's help, by the memory plan: torch sees 79.1 GiB of 80 GB."""
    from sophiavl_fast.monitor import budget
    from tests.monitor.published import MODELS

    (tmp_path / "config.json").write_text(json.dumps(MODELS["qwen2_5_vl_7b"][0]))
    plan = verify_node.gpu_plan(8, 4, verify_node.key_heads(str(tmp_path)))
    for processes, settings in plan.runs.values():
        budget.require(loaded(plan, processes, [f"model.path={tmp_path}", *settings]), processes, budget.Device(True, 79.1 * budget.GIB, "triton"))


@pytest.mark.parametrize("arguments,said", [
    (["--dry-run", "--steps", "0"], "--steps 0: at least 2, since the first is left out of the rates"),
    (["--dry-run", "--steps", "1"], "--steps 1: at least 2"), (["--dry-run", "--steps", "x"], "argument --steps: invalid int value: 'x'"),
    (["--dry-run", "nowhere"], "'nowhere' is no Hugging Face folder; name one, or leave it out for the demo's tiny model"),
    (["nowhere"], "'nowhere' is no Hugging Face folder; name one, or use --dry-run"), (["--gpus", "3", "."], "--gpus 3: an even number of at least 2"),
    (["--gpus", "-2", "."], "--gpus -2: an even number"), (["--gpus", "64", "."], "--gpus 64: this machine shows "),
    (["--dry-run", "--gpus", "3"], "--gpus 3: a dry run has two processes and no GPU; leave it out"),
    (["--gpus", "2", "."], "model.path = '.': config.json lacks text_config and vision_config"),
])
def test_arguments_that_start_nothing_are_refused(tmp_path, monkeypatch, capsys, arguments, said):
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    monkeypatch.setattr(verify_node.sys, "argv", ["verify_node", *arguments])
    monkeypatch.setattr(verify_node, "prepare", None)
    with pytest.raises(SystemExit) as ended:
        verify_node.main()
    assert ended.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith(f"verify_node: error: {said}")


def test_a_relative_path_is_the_callers(tmp_path, monkeypatch):
    """Runs start in the checkout's folder; of one that fails, what the program said comes before the last lines, which are torchrun's."""
    commands, line = [], "sophiavl-fast: rank 1: model.path = 'x': no such thing"

    def start(command, **how):
        commands.append(command)
        assert how["cwd"] == verify_node.ROOT != tmp_path
        return subprocess.CompletedProcess(command, 1, "", "\n".join(["loading", line, *(f"torchrun's line {i}" for i in range(60))]))

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    monkeypatch.setattr(verify_node.sys, "argv", ["verify_node", "--dry-run", "tiny", "--work", "here", "--out", "node.json"])
    monkeypatch.setattr(verify_node.subprocess, "run", start)
    with pytest.raises(SystemExit) as ended:
        verify_node.main()
    paths = dict(word.partition("=")[::2] for word in commands[0] if word.startswith(("model.path=", "run.dir=", "data.registry=")))
    assert paths == {"model.path": f"{tmp_path}/tiny", "run.dir": f"{tmp_path}/here/gloo", "data.registry": f"{tmp_path}/here/data/dataset_info.json"}
    first, second, *rest = str(ended.value).splitlines()
    assert first == "gloo: the run failed with exit code 1" and second == line and rest == [f"torchrun's line {i}" for i in range(30, 60)]


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.layout
def test_a_dry_run(tmp_path):
    done = subprocess.run(["bash", str(ROOT / "scripts" / "verify_node.sh"), "--dry-run", "--steps", "2", "--out", str(tmp_path / "node.json"), "--work",
                           str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "node.json").read_text())
    assert found["failures"] == [] and found["greedy_match"] == 1.0 and found["dry_run"]
    assert {name: (r["processes"], r["engines"], r["restarts"]) for name, r in found["runs"].items()} == {"gloo": (2, 2, 0), "gloo_replicas": (2, 2, 0)}
    for r in found["runs"].values():
        assert r["transfer"]["bytes"] > 8e6 and r["rollout_tokens_per_s"] > 0 and r["train_tokens_per_s"] > 0
        assert sum(r["transfer"]["phases"].values()) <= r["transfer"]["seconds"]
