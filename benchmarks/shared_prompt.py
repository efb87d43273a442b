"""What computing a group's prompt once saves: one update of the policy, shared prompt against plain packing.

    python benchmarks/shared_prompt.py --out benchmarks/results/shared_prompt_cpu.json

n = 8 responses of R tokens to prompts of P tokens (an image and a question), P:R = 1:1, 4:1, 16:1. The bound is the ratio of tokens,
n (P + R) / (P + n R); the vision tower, which is also computed once, can carry the measured ratio beyond it. Log-probs are compared first.
"""
from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("prompts", 8), ("n", 8), ("response", 24), ("runs", 7), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--work", default="build/bench")
    parser.add_argument("--out", default="benchmarks/results/shared_prompt_cpu.json")
    a = parser.parse_args()

    import torch

    from sophiavl_fast import config as tree
    from sophiavl_fast.data.demo import tiny_model
    from sophiavl_fast.data.processor import Processor
    from sophiavl_fast.policy import Policy

    torch.set_num_threads(a.threads)
    model = Path(a.work) / "model"
    if not (model / "config.json").exists():
        tiny_model.build(model, 0)
    config = tree.build({"device": "cpu", "model": {"path": str(model), "dtype": "float32"}, "optim": {"lr": 1e-5}, "algorithm": {"kl_coef": 0.0}}, "benchmark")
    processor, policy, rows = Processor(str(model), max_pixels=1024 * 28 * 28), Policy.create(config, reference=False, total_steps=1000), []
    for ratio in (1, 4, 16):
        groups = [_group(processor, a, ratio, i) for i in range(a.prompts)]
        rows.append(_compare(policy, config, groups, a))
        print(rows[-1], flush=True)
    policy.close()
    common.write(Path(a.out), {"shape": {"prompts": a.prompts, "n": a.n, "response": a.response, "threads": a.threads}, "rows": rows})


def _group(processor: Any, a: argparse.Namespace, ratio: int, seed: int) -> Any:
    """A prompt of about ratio x response tokens and n random responses of equal length."""
    import numpy as np
    from PIL import Image

    from sophiavl_fast.types import Group, Prompt, Response

    random = np.random.RandomState(seed)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "sum?"}]}]
    overhead = len(processor.prepare(messages, [Image.new("RGB", (56, 28))])[2]) - 2
    width = max(2, ratio * a.response - overhead)
    height = 1 if width <= 64 else 4 if width <= 128 else 12
    picture = Image.fromarray((random.rand(28 * height, 28 * (width // height), 3) * 255).astype("uint8"))
    text, ids, expanded, images, pixels, grid = processor.prepare(messages, [picture])
    prompt = Prompt(id=f"bench:{seed}", dataset="bench", problem_type="numerical", question="sum?", gold="3", text=text, token_ids=ids,
                    expanded_ids=expanded, images=images, image_paths=[""], pixel_values=pixels, image_grid_thw=grid)
    answers = [random.randint(20, 60, a.response).tolist() for _ in range(a.n)]
    return Group(prompt=prompt, responses=[Response(token_ids=t, logprobs=[0.0] * len(t), text="", finish_reason="length", seed=0,
                                                    weight_versions=[0] * len(t)) for t in answers])


def _compare(policy: Any, config: Any, groups: list[Any], a: argparse.Namespace) -> dict[str, Any]:
    import torch

    advantages = torch.randn(a.prompts * a.n, generator=torch.Generator().manual_seed(0))
    packed, seconds, found = {}, {True: [], False: []}, {}
    for shared in (True, False):
        config.policy.share_prompt = shared
        packed[shared] = policy.pack(groups, advantages)
        found[shared] = torch.cat(policy.logprobs(packed[shared]))
    from sophiavl_fast.algorithms import losses

    loss = losses.make_grpo_loss(config, losses.denominator(packed[True], config))
    for run in range(a.runs + 2):
        for shared in (True, False):
            began = time.perf_counter()
            policy.update(packed[shared], loss)
            if run >= 2:
                seconds[shared].append(time.perf_counter() - began)
    prompt = len(groups[0].prompt.expanded_ids)
    plain, once = common.spread(seconds[False]), common.spread(seconds[True])
    return {"prompt": prompt, "response": a.response, "plain_s": plain, "shared_s": once, "speedup": plain["median"] / once["median"],
            "token_ratio": a.n * (prompt + a.response) / (prompt + a.n * a.response),
            "logprob_diff_max": (found[True] - found[False]).abs().max().item()}


if __name__ == "__main__":
    main()
