"""Two tensor-parallel ranks whose disk is full on one of them, and that load what is damaged: each prints what it was told. Started by torchrun."""
import json
import os
import resource
import sys
from pathlib import Path

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
sys.path.insert(0, str(Path(__file__).parent))

import tiny
import torch

from sophiavl_fast.policy import Policy, checkpoint
from sophiavl_fast.policy.checkpoint import whole
from sophiavl_fast.policy.saver import Saver


def told(work):
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def full(policy, out):
    """A limit of one process stands for a full disk: no file of more than 20,000 bytes."""
    limits, found = resource.getrlimit(resource.RLIMIT_FSIZE), []
    for background in (False, True):
        with Saver(policy, out, keep=9, background=background) as saver:
            saver.save(1, {})
            saver.wait()
            if os.environ["RANK"] == "1":
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            found.append(told(lambda: (saver.save(2, {}), saver.wait())))
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            saver.save(3, {})
    return found


def damaged(policy, path):
    if os.environ["RANK"] == "0":
        part = max((p for p in path.iterdir() if p.suffix in (".distcp", ".safetensors")), key=lambda p: p.name)
        data = part.read_bytes()
        part.write_bytes(data[:-30] + bytes(b ^ 255 for b in data[-30:]))
    policy.layout.wait("damage")
    return [told(lambda: checkpoint.load(policy, path))]


def main():
    torch.set_num_threads(1)
    whole.PART_BYTES = 100_000   # so that the disk is full long before the last tensor is gathered
    folder, out, form = sys.argv[1:]
    sections = {"parallel": {"tensor": 2}, "checkpoint": {"format": form}, "policy": {"control_timeout_s": 60}}
    policy = Policy.create(tiny.config(Path(folder), **sections), reference=False, total_steps=1)
    found = full(policy, Path(out)) + damaged(policy, Path(out) / "checkpoints/step_3")
    sys.stdout.write(json.dumps([os.environ["RANK"], found]) + "\n")   # one write: lines do not mix
    policy.close()


if __name__ == "__main__":
    main()
