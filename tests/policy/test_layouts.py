"""Tensor, sequence, pipeline and data parallel runs under torchrun (gloo) give the numbers of a single process."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from sophiavl_fast.policy import checkpoint

WORKER = Path(__file__).with_name("layout_worker.py")
COMMON = {"policy": {"tokens_per_row": 60}, "optim": {"lr": 1e-3, "clip_grad": 0.0, "weight_decay": 0.1}}


def torchrun(folder: Path, out: Path, processes: int, parallel: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(WORKER),
               str(folder), str(out), json.dumps(COMMON | {"parallel": parallel})]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.fixture(scope="module")
def single(folder, tied_folder, tmp_path_factory):
    """found, logprobs by group, export of the same steps in one process, for the untied and the tied model."""
    made = {}

    def of(tied: bool):
        if tied not in made:
            out = tmp_path_factory.mktemp("single")
            torchrun(tied_folder if tied else folder, out, 1, {})
            made[tied] = out
        return made[tied]

    return of


LAYOUTS = {
    "tp2": (2, {"tensor": 2}), "tp2-sp": (2, {"tensor": 2, "sequence": True}), "pp2": (2, {"pipeline": 2}), "dp2": (2, {}),
    "tp2-pp2-sp": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
}
QUICK = {("tp2-sp", False), ("pp2", False)}  # the others only in `make test-all`


@pytest.mark.layout
@pytest.mark.parametrize("layout,tied", [
    pytest.param(name, tied, marks=[] if (name, tied) in QUICK else pytest.mark.slow)
    for name, tied in (*((name, False) for name in LAYOUTS), ("tp2-sp", True), ("pp2", True))])
def test_layout_equals_a_single_process(folder, tied_folder, create, single, tmp_path, layout, tied):
    processes, parallel = LAYOUTS[layout]
    path, alone = tied_folder if tied else folder, single(tied)
    torchrun(path, tmp_path, processes, parallel)

    replicas = 2 if layout == "dp2" else 1
    sizes = [sum(len(r.token_ids) for r in g.responses) for g in tiny.groups()]
    parts = [load_file(tmp_path / f"replica-{i}.safetensors")["logprobs"].split(sizes[i::replicas]) for i in range(replicas)]
    logprobs = torch.cat([parts[g % replicas][g // replicas] for g in range(len(sizes))])
    assert (logprobs - load_file(alone / "replica-0.safetensors")["logprobs"]).abs().max() < 1e-5

    found, expected = load_file(tmp_path / "found.safetensors"), load_file(alone / "found.safetensors")
    assert set(found) == set(expected)
    assert max(((found[n] - g).norm() / g.norm().clamp_min(1e-7)).item() for n, g in expected.items()) < 1e-5

    weights, straight = load_file(tmp_path / "hf/model.safetensors"), load_file(alone / "hf/model.safetensors")
    assert set(weights) == set(straight)
    # Adam turns rounding noise in vanishing gradients into full steps (a key bias has none): compare the bulk
    assert max((weights[n] - t).abs().mean().item() for n, t in straight.items() if "k_proj.bias" not in n) < 2e-5

    policy = create(path, **COMMON)  # one process goes on from what the layout saved
    assert checkpoint.load(policy, checkpoint.newest(tmp_path)) == {"from": parallel}
    assert policy.updates == 1


@pytest.mark.slow
@pytest.mark.layout
def test_checkpoint_moves_between_layouts(folder, single, tmp_path):
    """Weights and moments saved by TP2+SP equal, tensor by tensor, those saved by one process after the same update, up to rounding."""
    torchrun(folder, tmp_path, 2, {"tensor": 2, "sequence": True})
    read = lambda root: {n: t for f in checkpoint.newest(root).glob("*.safetensors") for n, t in load_file(f).items()}
    found, expected = read(tmp_path), read(single(False))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        if name.startswith("exp_avg"):
            assert (found[name] - tensor).norm() <= 2e-5 * tensor.norm() + 1e-9, name
