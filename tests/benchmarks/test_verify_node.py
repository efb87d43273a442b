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


def test_the_plans_of_a_node():
    """Half of the GPUs for engines, each its own; nothing that the config would refuse."""
    from sophiavl_fast import config

    for gpus in (2, 4, 6, 8):
        for processes, settings in verify_node.gpu_plan(gpus, 4).runs.values():
            tree = config.load(ROOT / "configs" / "demo.yaml", ["rollout.engine=server", "rollout.prompts_per_step=48", *settings], world_size=processes)
            assert not set(tree.rollout.gpus) & set(range(processes)) and len(tree.rollout.gpus) in (0, gpus - processes)


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
