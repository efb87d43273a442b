"""A real policy's peak memory by phase, from the allocator itself: every block that torch's CPU allocator hands out and takes back, with its time,
as the profiler records them. Exact to the byte for tensors, temporaries of C++ kernels included; no framework base, no page rounding.

Run by itself (or under torchrun) with a JSON file of jobs; writes one JSON a rank and job beside it.
"""
from __future__ import annotations

import functools
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "policy"))

import tiny
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from sophiavl_fast.monitor.plan import Row
from sophiavl_fast.policy import Policy, checkpoint
from sophiavl_fast.types import Batch, Group


def model(folder: Path, *, hidden: int, layers: int, ffn: int, vocab: int, vision: dict[str, int]) -> Path:
    """A random Qwen2.5-VL of these sizes."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    heads = hidden // 64
    config = Qwen2_5_VLConfig(
        text_config={"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
                     "num_key_value_heads": heads // 2, "max_position_embeddings": 4096, "eos_token_id": 2, "pad_token_id": 0,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}, "tie_word_embeddings": False},
        vision_config={"out_hidden_size": hidden, "patch_size": 14, "window_size": 112, "spatial_merge_size": 2, "temporal_patch_size": 2,
                       "fullatt_block_indexes": [1], **vision},
        image_token_id=tiny.IMAGE, video_token_id=121, vision_start_token_id=tiny.VISION_START, vision_end_token_id=tiny.VISION_END)
    return tiny.save(Qwen2_5_VLForConditionalGeneration, config, folder, 0)


def groups(count: int, text: int, grids: list, lengths: list[int]) -> list[Group]:
    generator = torch.Generator().manual_seed(0)
    return [tiny.group(generator, str(i), grids, lengths, text) for i in range(count)]


def row_of(batches: list[Batch]) -> Row:
    """The plan's description of the largest row."""
    b = max(batches, key=lambda x: len(x.tokens))
    response, prompt = b.cu_seqlens.diff(), b.prompt_len
    keys = response + prompt[b.group_of]
    patches = max((0 if x.image_grid_thw is None else int(x.image_grid_thw.prod(-1).sum())) for x in batches)
    return Row(tokens=len(b.tokens), targets=len(b.target), keys=int(prompt.sum() + keys.sum()),
               scores=int((prompt**2).sum() + (response * keys).sum()), patches=patches, count=len(batches))


def measure(folder: str, sections: dict[str, Any], shape: list[Any], out: str) -> dict[str, Any]:
    """Peak bytes by phase of this rank, and the row that they were measured with."""
    sections = {"policy": {"tokens_per_row": 10_000}, **sections}
    config = tiny.config(Path(folder), **sections)
    given = groups(*shape)
    gc.collect()    # what an earlier policy left behind would be taken off this one's account as it goes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        with record_function("phase:load"):
            policy = Policy.create(config, reference=config.algorithm.kl_coef > 0, total_steps=4)
        mine = given[policy.replica::policy.replicas]
        batches = policy.pack(mine, torch.ones(sum(len(g.responses) for g in mine)))
        for name in ("first", "update"):   # moments are there from the second on
            with record_function(f"phase:{name}"):
                policy.update(batches, lambda b, lp, h: (-(lp.sum() + 0.01 * h.sum()) / 1000, lp.detach().sum()[None]), entropy=True)
        with record_function("phase:log-probs"):
            policy.logprobs(batches, reference=config.algorithm.kl_coef > 0)
        with record_function("phase:transfer"):   # as a lead's peer takes part in it
            for _ in policy.weights():
                pass
        with record_function("phase:save"):
            checkpoint.save(policy, out, 1, {}, keep=1)
        policy.layout.wait("measured")
    place = {"stage": dist.get_rank(policy.layout.pp_group), "replicas": policy.replicas}
    row = row_of(batches)
    policy.close()
    return {"peaks": peaks(profiler), "row": {f: getattr(row, f) for f in row.__dataclass_fields__}, "place": place}


def peaks(profiler: Any) -> dict[str, int]:
    """The most bytes that were out at any time of each phase."""
    events = profiler.profiler.kineto_results.events()
    blocks = sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda entry: entry[0])
    spans = {e.name()[6:]: (e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name().startswith("phase:")}
    found, out = dict.fromkeys(spans, 0), 0
    for at, size in blocks:
        out += size
        for name, (begin, end) in spans.items():
            if begin <= at <= end:
                found[name] = max(found[name], out)
    return found


def let_go(wait: Any) -> Any:
    """gloo's threads hold a collective's tensors until they run again, a moment after its end, and the account knows of no other thread's frees; NCCL has
    no such threads, and the plan no such item."""
    @functools.wraps(wait)
    def waiting(*arguments: Any, **named: Any) -> Any:
        found = wait(*arguments, **named)
        time.sleep(0.02)
        return found

    return waiting


def main() -> None:
    torch.set_num_threads(1)
    dist.Work.wait = let_go(dist.Work.wait)   # where every collective ends, megatron's own names for some of them too
    dist.init_process_group("gloo")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        found = measure(job["folder"], job["sections"], job["shape"], job["out"])
        Path(f"{job['out']}-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
