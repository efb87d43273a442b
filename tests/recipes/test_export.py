"""`export CHECKPOINT OUT`: any machine will do, and a place where nothing can be made is one line."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from sophiavl_fast import config as tree
from sophiavl_fast.cli import main
from sophiavl_fast.data.demo import tiny_model
from sophiavl_fast.policy import Policy, checkpoint


@pytest.fixture(scope="module", params=["safetensors", "torch_dist"])
def saved(tmp_path_factory, request):
    """A checkpoint of either format as a run on a GPU leaves it, and its model's folder."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model.build(folder / "model", 0)
    config = tree.build({"device": "cpu", "model": {"path": str(folder / "model"), "dtype": "float32"}, "checkpoint": {"format": request.param}}, "test")
    policy = Policy.create(config, reference=False, total_steps=1)
    kept = config.model_dump() | {"device": "cuda"}
    path = checkpoint.save(policy, folder / "run", 1, {"step": 1, "total_steps": 1, "seed": 0, "loader": {}, "config": kept}, keep=1)
    policy.close()
    return path, folder / "model"


def test_a_gpus_checkpoint_is_exported_where_there_is_none(saved, tmp_path, monkeypatch, capsys):
    path, model = saved
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["export", str(path), str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"step": 1, "out": str(tmp_path / "out")}
    source, out = load_file(model / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert set(source) == set(out) and all(torch.equal(source[name], out[name]) for name in source)


def test_what_only_a_gpu_has_is_not_needed(saved, tmp_path):
    """policy.kernels and policy.attention are of the run, not of its weights."""
    path, _ = saved
    here = shutil.copytree(path, tmp_path / path.name)
    manifest = json.loads((here / "manifest.json").read_text())
    manifest["state"]["config"]["policy"] |= {"kernels": "triton", "attention": "flash_attn", "offload_optimizer": True}
    (here / "manifest.json").write_text(json.dumps(manifest))
    assert main(["export", str(here), str(tmp_path / "out")]) == 0


def test_a_place_below_a_file_is_one_line(saved, tmp_path, capsys):
    (tmp_path / "file").touch()
    for place in ("file/out", "file/far/out"):
        assert main(["export", str(saved[0]), str(tmp_path / place)]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and f"'{tmp_path}/{place}' cannot be made: '{tmp_path}/file' is a file" in said[0], said


def test_into_the_empty_folder_where_one_is(saved, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["export", str(saved[0]), "."]) == 0
    assert (tmp_path / "here" / "model.safetensors").is_file()
