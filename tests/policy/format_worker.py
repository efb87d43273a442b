"""Checkpoints handed from layout to layout: each job loads what another left, and leaves it again in both formats. Started by torchrun.

A job without `load` trains first, so that moments and main weights are there, and goes on training while its second checkpoint is written.
"""
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
sys.path.insert(0, str(Path(__file__).parent))

import tiny
import torch
import torch.distributed as dist
import zoo

from sophiavl_fast.policy import Policy, checkpoint
from sophiavl_fast.policy.saver import Saver


def loss(batch, logprob, entropy):
    value = -(batch.advantage.repeat_interleave(batch.cu_seqlens.diff()) * logprob).sum() / 40
    return value, value.detach()[None]


def do(folder: str, out: str, sections: dict[str, Any], load: str = "") -> None:
    policy = Policy.create(tiny.config(Path(folder), **sections), reference=False, total_steps=4)
    groups = zoo.groups(zoo.kind_of(Path(folder)))[policy.replica::policy.replicas]
    weights = torch.linspace(-1, 1, sum(len(g.responses) for g in groups))
    batches = policy.pack(groups, weights) if policy.is_lead else policy.pack([], None)
    if load:
        assert checkpoint.load(policy, load) == {"from": "training"}
        assert policy.updates == 2
    else:
        for _ in range(2):
            policy.update(batches, loss)
    for form in ("safetensors", "torch_dist"):
        policy.config.checkpoint.format = form
        with Saver(policy, Path(out) / form, keep=1, background=form == "torch_dist") as saver:
            saver.save(2, {"from": "training"})
            if form == "torch_dist":
                policy.update(batches, loss)   # must not reach what is being written
    policy.close()


def main() -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # torchrun's own
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for i, job in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        # groups of its own for each job: megatron only forgets its groups, and their threads would stay
        dist.init_process_group("gloo", store=dist.PrefixStore(f"job-{i}", store), rank=rank, world_size=ranks)
        do(**job)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
