"""Supervised fine-tuning on responses, with the same engine as RL: the warm start, and the thinking reward model's training.

The loss is the mean negative log-likelihood over all response tokens of the step, on every replica together.
"""
from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from sophiavl_fast.algorithms import losses
from sophiavl_fast.config import Config
from sophiavl_fast.data.loader import Loader
from sophiavl_fast.data.processor import Processor
from sophiavl_fast.errors import UserError
from sophiavl_fast.monitor import Progress, memory, write_report
from sophiavl_fast.policy import Policy
from sophiavl_fast.policy.saver import Saver
from sophiavl_fast.recipes import ranks, setup
from sophiavl_fast.recipes.muster import Muster
from sophiavl_fast.types import Group, Prompt, Response


def train(config: Config) -> int:
    """Run `run.steps` optimizer steps of `sft.batch_size` records; returns the exit code."""
    run_dir = Path(config.run.dir)
    found = setup.resume_point(config)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(config, "SFT"))
        progress.watch = stack.enter_context(Muster(run_dir, config.policy.control_timeout_s)).phase
        with progress.phase("data"):
            processor = Processor(config.model.path, min_pixels=config.model.min_pixels, max_pixels=config.model.max_pixels)
            loader = Loader.open(config, processor)
            stack.callback(loader.close)
        with progress.phase("policy"):
            policy = Policy.create(config, reference=False, total_steps=setup.updates(config))
            stack.callback(policy.close)
            done = setup.restore(config, policy, loader, found)
            progress.resume(done or 0)
        log = ranks.open_log(run_dir, config, done)
        stack.callback(log.close)
        setup.write_config(run_dir, config)
        saver = stack.enter_context(Saver(policy, run_dir, keep=config.checkpoint.keep, background=config.checkpoint.background))
        for step in range((done or 0) + 1, config.run.steps + 1):
            metrics = one_step(config, loader, processor, policy, progress)
            log.metrics(step, metrics)
            progress.step(step, metrics)
            if setup.checkpoint_due(config, step):
                with progress.phase("save"):
                    saver.save(step, setup.state(config, step, loader.state()))
        with progress.phase("export"):
            policy.export(config.run.export or run_dir / "hf")
    if setup.is_first_rank():
        write_report(run_dir)
    return 0


def one_step(config: Config, loader: Loader, processor: Processor, policy: Policy, progress: Progress) -> dict[str, float]:
    """One optimizer step on sft.batch_size records; returns its metrics."""
    started = time.perf_counter()
    with progress.phase("data"):
        prompts = loader.next(config.sft.batch_size, replica=policy.replica, replicas=policy.replicas) if policy.is_lead else []
        batches = policy.pack([as_group(p, processor, config.sft.target) for p in prompts], None)
    with progress.phase("update") as update:
        count = policy.sum_over_replicas(losses.token_count(batches))
        result = policy.update(batches, losses.sft_loss(count))
    return losses.sft_metrics(result.stats) | {
        "policy/grad_norm": result.grad_norm, "optim/lr": result.lr, "data/skipped": loader.skipped,
        "train/tokens_per_s": float(count) / update.seconds, "time/update_s": update.seconds, "time/step_s": time.perf_counter() - started,
    } | memory.metrics()


def as_group(prompt: Prompt, processor: Processor, target: str) -> Group:
    """A record as a group of one response: its trace and answer, or its answer alone (tagged or bare), closed by end-of-text."""
    text = {"process": f"{prompt.process}<answer>{prompt.gold}</answer>", "solution": prompt.gold, "answer": f"<answer>{prompt.gold}</answer>"}[target]
    if target == "process" and not prompt.process:
        raise UserError(f"record {prompt.id} has no 'process' to learn from; use sft.target=solution")
    ids = [*processor.tokenizer(text, add_special_tokens=False)["input_ids"], processor.stop_ids[0]]
    response = Response(token_ids=ids, logprobs=[0.0] * len(ids), text=text, finish_reason="stop", seed=0, weight_versions=[0] * len(ids))
    return Group(prompt=prompt, responses=[response])
