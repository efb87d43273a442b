"""TRL's GRPOTrainer on the benchmark's model and token counts: one JSON line {seconds: [...], peak_gib}. Run by rl_step.py.

Needs its own packages: `pip install --no-deps --target build/trl -r benchmarks/requirements-trl.txt` (make bench-env does it).
"""
# ruff: noqa: I001
from __future__ import annotations

import argparse
import json
import resource
import time

import sophiavl_fast  # noqa: F401  (the torchvision hook, before anything that imports it)
import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def main() -> None:
    ap = argparse.ArgumentParser()
    ap.add_argument("model")
    for name, default in (("prompts", 32), ("n", 8), ("tokens", 24), ("steps", 8), ("threads", 2), ("rows", 256)):
        ap.add_argument(f"--{name}", type=int, default=default)
    ap.add_argument("--banned", type=json.loads, default=[], help="token ids never sampled, end-of-text included: all responses have equal length")
    ap.add_argument("--question", default="max-min?")
    ap.add_argument("--kl", type=float, default=0.04)
    ap.add_argument("--vllm", action="store_true", help="sample by vLLM in TRL's colocate mode (ends at TRL's first weight sync on vLLM's CPU build)")
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    random = np.random.RandomState(0)
    rows = [{"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": a.question}]}],
             "image": Image.fromarray((random.rand(28, 84, 3) * 255).astype("uint8"))} for _ in range(a.prompts * a.steps)]
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    samples = a.prompts * a.n
    if a.vllm:
        sampler = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 512,
                   "generation_kwargs": {"min_tokens": a.tokens, "logit_bias": {token: -100.0 for token in a.banned}}}
    else:
        sampler = {"generation_kwargs": {"min_new_tokens": a.tokens, "suppress_tokens": a.banned}}
    config = GRPOConfig(output_dir="build/trl_out", use_cpu=True, per_device_train_batch_size=a.rows, gradient_accumulation_steps=samples // a.rows,
                        num_generations=a.n, max_completion_length=a.tokens, beta=a.kl, learning_rate=1e-5, max_steps=a.steps, logging_steps=1000,
                        save_strategy="no", report_to=[], bf16=False, fp16=False, gradient_checkpointing=False, temperature=1.0, disable_tqdm=True,
                        **sampler)
    trainer = GRPOTrainer(model=a.model, reward_funcs=lambda completions, **_: [float(len(str(c)) % 7) / 7 for c in completions], args=config,
                          train_dataset=Dataset.from_list(rows), callbacks=[Clock()])
    started = time.perf_counter()
    trainer.train()
    seconds = np.diff([started, *ends]).tolist()
    print(json.dumps({"seconds": seconds, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


if __name__ == "__main__":
    main()
