"""Checkpoints of both formats through every layout, bitwise: what one layout saved, another loads and saves again, and nothing has changed at the end."""
import json
import os
import subprocess
import sys

import format_worker
import pytest
import torch
import zoo
from matrix import LAYOUTS
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from safetensors.torch import load_file

from sophiavl_fast.policy import checkpoint
from sophiavl_fast.policy.checkpoint import vetted

pytestmark = pytest.mark.layout
ROADS = [("qwen2_5_vl", False, "float32"), ("qwen3_vl", True, "bfloat16"), ("internvl3", True, "float32")]
TWO, FOUR = ("TP2+SP", "PP2", "DP2", "CP2", "PP2 uneven"), ("TP2xPP2+SP", "DP2xTP2", "DP2xCP2")


def sections(layout, dtype):
    return {"parallel": LAYOUTS[layout][1], "model": {"dtype": dtype}, "policy": {"tokens_per_row": 60}, "optim": {"lr": 1e-2, "weight_decay": 0.1}}


def road(root, layouts):
    """Every family from layout to layout, by torch_dist checkpoints, in one torchrun; the first layout trains."""
    jobs = []
    for kind, tied, dtype in ROADS:
        folder, load = zoo.build(kind, root / f"model-{kind}", tied=tied), ""
        for layout in layouts:
            out = root / kind / layout.replace(" ", "_")
            model = sections(layout, dtype)
            jobs.append({"folder": str(folder), "out": str(out), "sections": model, "load": load})
            load = str(out / "torch_dist/checkpoints/step_2")
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={LAYOUTS[layouts[0]][0]}",
               format_worker.__file__, str(root / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return road(tmp_path_factory.mktemp("two"), TWO)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return road(tmp_path_factory.mktemp("four"), FOUR)


def whole(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def check(root, layouts, kind, create):
    """The safetensors of every stop, and of one process that loads the last torch_dist, are those of the first."""
    dtype = next(r[2] for r in ROADS if r[0] == kind)
    expected = whole(root / kind / layouts[0] / "safetensors/checkpoints/step_2")
    assert any(n.startswith("exp_avg_sq/") and t.abs().sum() > 0 for n, t in expected.items())
    assert any(n.startswith("main/") for n in expected) == (dtype == "bfloat16")
    for layout in layouts[1:]:
        found = whole(root / kind / layout.replace(" ", "_") / "safetensors/checkpoints/step_2")
        assert found.keys() == expected.keys(), layout
        assert all(torch.equal(found[n], t) for n, t in expected.items() if n != "rng/cpu"), layout
    alone = create(root / f"model-{kind}", **sections(layouts[0], dtype) | {"parallel": {}})
    checkpoint.load(alone, root / kind / layouts[-1].replace(" ", "_") / "torch_dist/checkpoints/step_2")
    found = whole(checkpoint.save(alone, root / kind / "alone", 2, {}, keep=1))
    assert found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())


@pytest.mark.parametrize("kind", [r[0] for r in ROADS])
def test_two_ranks_and_one(two, kind, create):
    check(two, TWO, kind, create)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", [r[0] for r in ROADS])
def test_four_ranks_and_one(four, kind, create):
    check(four, FOUR, kind, create)


def test_every_rank_writes_its_own_part_and_no_more(two):
    """Two ranks' files together are the tensors' bytes, each about half; a replicated tensor is there once, and no file holds what the records do not."""
    for layout in ("TP2+SP", "DP2", "CP2"):
        folder = two / "qwen2_5_vl" / layout / "torch_dist/checkpoints/step_2"
        sizes = [sum(file.stat().st_size for file in folder.glob(f"__{rank}_*.distcp")) for rank in range(2)]
        places = vetted.read(folder).storage_data
        kept = sum(t.nbytes for t in whole(two / "qwen2_5_vl" / layout / "safetensors/checkpoints/step_2").values())
        assert max(sizes) < 0.8 * sum(sizes), layout
        assert sum(place.length for place in places.values()) == sum(sizes), layout
        lengths = [torch.Size(c.sizes).numel() * t.properties.dtype.itemsize for t in vetted.read(folder).state_dict_metadata.values() for c in t.chunks]
        assert sum(lengths) == kept and len(places) == len(lengths), layout


def test_megatrons_own_reader_opens_it(two, create):
    """`dist_checkpointing.load` on the folder as it lies there: whole tensors under their published names."""
    create(two / "model-qwen2_5_vl")   # it asks for a process group
    folder = two / "qwen2_5_vl/DP2"
    expected = whole(folder / "safetensors/checkpoints/step_2")
    wanted = {n: ShardedTensor.from_rank_offsets(n, torch.empty_like(t)) for n, t in expected.items() if n.startswith(("model/", "exp_avg/"))}
    found = dist_checkpointing.load(wanted, str(folder / "torch_dist/checkpoints/step_2"))
    assert len(wanted) > 50 and all(torch.equal(found[n], expected[n]) for n in wanted)
