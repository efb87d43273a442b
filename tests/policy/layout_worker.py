"""Started by torchrun: one policy in some layout, its numbers written for the test to compare.

Arguments: folder, out, a JSON object of config sections. The lead of each replica packs its share of the groups.
"""
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
sys.path.insert(0, str(Path(__file__).parent))

import tiny
import torch
from safetensors.torch import save_file

from sophiavl_fast.policy import Policy, checkpoint


def main() -> None:
    folder, out, sections = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    policy = Policy.create(tiny.config(folder, **sections), banned_ids=[1, 130], temperature=0.9, reference=True, total_steps=4)
    groups = tiny.groups()
    mine = groups[policy.replica::policy.replicas]
    flat = torch.arange(sum(len(g.responses) for g in groups)).split([len(g.responses) for g in groups])
    advantages = torch.cat(flat[policy.replica::policy.replicas]).float() / 7 - 0.5
    batches = policy.pack(mine, advantages) if policy.is_lead else policy.pack([], None)
    count = policy.sum_over_replicas(torch.tensor(float(sum(len(b.target) for b in batches))))

    def loss(batch, logprob, entropy):
        weight = batch.advantage.repeat_interleave(batch.cu_seqlens.diff())
        value = -((weight * logprob).sum() + 0.01 * entropy.sum()) / count
        return value, torch.stack([value.detach(), torch.tensor(float(len(batch.target)))])

    logprobs = torch.cat(policy.logprobs(batches))
    result = policy.update(batches, loss, entropy=True)
    found = {"stats": result.stats, "norm": torch.tensor(result.grad_norm)}
    found |= {f"gradient/{n}": g.clone() for n, g in policy.gradients()}
    checkpoint.save(policy, out, 1, {"from": sections.get("parallel", {})}, keep=1)
    reference = torch.cat(policy.logprobs(batches, reference=True))
    assert torch.equal(reference, logprobs)
    policy.update(batches, loss, entropy=True)
    policy.export(out / "hf")
    save_file({"logprobs": logprobs}, str(out / f"replica-{policy.replica}.safetensors")) if policy.is_lead else None
    if torch.distributed.get_rank() == 0:
        save_file({k: v.contiguous() for k, v in found.items()}, str(out / "found.safetensors"))
    policy.close()


if __name__ == "__main__":
    main()
