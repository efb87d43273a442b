"""A policy in some layout, its numbers written for matrix.py to compare. Started by torchrun with a file of jobs, or called in one process.

The lead of each replica packs its share of the groups.
"""
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
sys.path.insert(0, str(Path(__file__).parent))

import tiny
import torch
import torch.distributed as dist
import zoo
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from safetensors.torch import save_file

from sophiavl_fast.policy import Policy
from sophiavl_fast.policy.saver import Saver

BANNED, TEMPERATURE = [1, 130], 0.9
# reductions that a test takes out, to see that the comparison would notice: what is replaced, and by what
BREAKS = {
    "": None,
    "no-row-sum": ("megatron.core.tensor_parallel.layers.reduce_from_tensor_model_parallel_region", lambda x, *a, **k: x),
    "no-head-sum": ("sophiavl_fast.policy.model.copy_to_tensor_model_parallel_region", lambda x: x),
    "no-norm-sum": ("megatron.core.distributed.finalize_model_grads._allreduce_non_tensor_model_parallel_grads", lambda *a, **k: None),
    "no-deepstack-sum": ("sophiavl_fast.policy.deepstack.copy_to_tensor_model_parallel_region", lambda x: x),
    "no-key-sum": ("sophiavl_fast.policy.context.gather_from_sequence_parallel_region",
                   lambda x, *, group, **_: gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=group)),
    "no-replica-sum": ("megatron.core.distributed.DistributedDataParallel.finish_grad_sync", lambda *a, **k: None),
}


def advantages(groups: list) -> torch.Tensor:
    """[B] of the responses in order."""
    return torch.arange(sum(len(g.responses) for g in groups)).float() / 7 - 0.5


def objective(weight: torch.Tensor, logprob: torch.Tensor, entropy: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return -((weight * logprob).sum() + 0.01 * entropy.sum()) / count


def do(folder: str, out: str, sections: dict[str, Any], broken: str = "") -> None:
    """Log-probs, gradients, export before and after two updates, a checkpoint after the first."""
    with mock.patch(*BREAKS[broken]) if broken else mock.patch.dict({}):
        _do(Path(folder), Path(out), sections)


def _do(folder: Path, out: Path, sections: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    policy = Policy.create(tiny.config(folder, **sections), banned_ids=BANNED, temperature=TEMPERATURE, reference=True, total_steps=4)
    groups = zoo.groups(zoo.kind_of(folder))
    mine = slice(policy.replica, None, policy.replicas)
    weights = torch.cat(advantages(groups).split([len(g.responses) for g in groups])[mine])
    pack = lambda: policy.pack(groups[mine], weights) if policy.is_lead else policy.pack([], None)
    batches = pack()
    count = policy.sum_over_replicas(torch.tensor(float(sum(len(b.target) for b in batches))))

    def loss(batch, logprob, entropy):
        value = objective(batch.advantage.repeat_interleave(batch.cu_seqlens.diff()), logprob, entropy, count)
        return value, torch.stack([value.detach(), torch.tensor(float(len(batch.target)))])

    policy.export(out / "before")
    logprobs = torch.cat(policy.logprobs(batches))
    policy.config.policy.tokens_per_row = 10_000  # all groups in one row: images and text mixed
    one_row = torch.cat(policy.logprobs(pack()))
    result = policy.update(batches, loss, entropy=True, active=lambda batch: torch.arange(len(batch.target)))
    gradients = {n: g.clone().contiguous() for n, g in policy.gradients()}
    saver = Saver(policy, out, keep=1, background=policy.layout.sequence)  # a later update must not reach what is being written
    saver.save(1, {"from": sections.get("parallel", {})})
    assert torch.equal(torch.cat(policy.logprobs(batches, reference=True)), logprobs)
    policy.update(batches, loss, entropy=True)
    policy.export(out / "after")
    saver.wait()
    if policy.is_lead:
        save_file({"logprobs": logprobs, "one_row": one_row}, str(out / f"replica-{policy.replica}.safetensors"))
    if dist.get_rank() == 0:
        save_file(gradients, str(out / "gradients.safetensors"))
        save_file({"stats": result.stats, "norm": torch.tensor(result.grad_norm)}, str(out / "result.safetensors"))
    policy.layout.wait("worker")
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
