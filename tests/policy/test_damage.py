"""Checkpoints whose files are not those that were written: bytes changed, lost, missing, parts of another; on one rank of two, too."""
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from spoilt import refused

from sophiavl_fast.errors import UserError
from sophiavl_fast.policy import checkpoint

FILES = {"safetensors": "part-0-0.safetensors", "torch_dist": "__0_0.distcp"}
FORMATS = pytest.mark.parametrize("form", FILES)


@FORMATS
def test_every_file_is_known_by_size_and_crc(saved, form):
    _, path = saved(form)
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert files == {f.name: [f.stat().st_size, zlib.crc32(f.read_bytes())] for f in path.iterdir() if f.name != "manifest.json"}
    assert FILES[form] in files


@FORMATS
def test_one_bit(saved, form):
    policy, path = saved(form)
    for name in json.loads((path / "manifest.json").read_text())["files"]:
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:])
        refused(policy, path, f"'{name}'")
        (path / name).write_bytes(whole)
    checkpoint.load(policy, path)


@FORMATS
def test_a_part_of_another_step(saved, form):
    policy, path = saved(form)
    shutil.copy(path.with_name("step_1") / FILES[form], path / FILES[form])
    refused(policy, path, f"'{FILES[form]}' is damaged or another checkpoint's")


@FORMATS
def test_a_part_longer_or_shorter_than_it_was(saved, form):
    policy, path = saved(form)
    part = path / FILES[form]
    whole = part.read_bytes()
    part.write_bytes(whole + b"\0")
    refused(policy, path, rf"'{FILES[form]}' is too long \({len(whole) + 1} bytes of {len(whole)}\)", before_weights=True)
    part.write_bytes(whole[:-1])
    refused(policy, path, rf"'{FILES[form]}' is cut short \({len(whole) - 1} bytes of {len(whole)}\)", before_weights=True)


@pytest.mark.parametrize("lacks,change", [
    ("sizes and CRCs of its files", {"files": []}), ("sizes and CRCs of its files", {"files": {"../a": [1, 2]}}),
    ("sizes and CRCs of its files", {"files": {"a": [1]}}), ("sizes and CRCs of its files", {"files": {"a": [1, True]}}),
    ("a count of updates and steps", {"updates": -1}), ("a count of updates and steps", {"step": -1})])
def test_a_manifest_that_is_none(saved, lacks, change):
    policy, path = saved("safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=f"manifest.json lacks {lacks}; another one is"):
        checkpoint.refuse_unusable(path, policy.config)


@pytest.mark.parametrize("form", [[], {}, None, 5, "zarr"])
def test_a_format_that_is_none(saved, form):
    policy, path = saved("safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": form}))
    with pytest.raises(UserError, match=r"is of the format .*; known: safetensors, torch_dist$"):
        checkpoint.refuse_unusable(path, policy.config)


@FORMATS
def test_a_file_that_is_not_there(saved, form):
    policy, path = saved(form)
    for name in json.loads((path / "manifest.json").read_text())["files"]:
        (path / name).rename(path / "elsewhere")
        refused(policy, path, f"'{name}' is not there", before_weights=True)
        (path / "elsewhere").rename(path / name)
    checkpoint.load(policy, path)


@pytest.mark.layout
@FORMATS
def test_both_ranks_hear_of_a_full_disk_and_of_damage(folder, tmp_path, form):
    """A disk that is full for one, in turn and in the background: the system's own words, what was saved before stands, a later save works. Bytes lost."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               str(Path(__file__).with_name("damage_worker.py")), str(folder), str(tmp_path), form]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    told = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert told["0"] == told["1"]
    *full, (kind, line) = told["0"]
    place = tmp_path / "checkpoints"
    assert full == [["UserError", f"checkpoint '{place}/step_2' could not be written (rank 1: File too large); what was saved before it stands"]] * 2
    assert sorted(p.name for p in place.iterdir()) == ["step_1", "step_3"]
    assert kind == "UserError" and line.startswith(f"checkpoint '{place}/step_3': '") and "is damaged" in line
