"""Trust-GRPO (SophiaVL-R1, arXiv 2505.17018), top to bottom like the paper.

    prompts -> groups of n responses -> outcome and thinking scores -> trust-weighted advantages -> update -> transfer

Departures from the published method, each a config line: losses are global token means (`algorithm.aggregate`),
samples are drawn from exactly the distribution that is differentiated (top_p 1), and a thinking score that could not
be had is NaN and drops its group's thinking term (`thinking.quorum`) instead of counting as 0.

Step s of run.steps (from 1) is computed from the policy after s - 1 steps; annealing counts steps done, from 0.
Step 0 in the metrics is the evaluation before any update.
"""
from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from sophiavl_fast import types
from sophiavl_fast.algorithms import losses, trust
from sophiavl_fast.config import Config
from sophiavl_fast.data import open_eval
from sophiavl_fast.data.loader import Loader
from sophiavl_fast.data.processor import Processor
from sophiavl_fast.errors import EngineError
from sophiavl_fast.evaluate import accuracy
from sophiavl_fast.monitor import Progress, RunLog, memory, summary, write_report
from sophiavl_fast.policy import Policy, checkpoint
from sophiavl_fast.recipes import samples, setup
from sophiavl_fast.rewards import Rewards
from sophiavl_fast.rollout import open_rollout


@dataclass(slots=True)
class Rooms:
    """Everything a step needs, open."""

    config: Config
    loader: Loader
    policy: Policy
    rollout: object
    rewards: Rewards
    progress: Progress
    held_out: list[types.Prompt]


def train(config: Config) -> int:
    """Run the recipe to run.steps; returns the exit code. Goes on from the newest checkpoint unless run.resume says never."""
    run_dir = Path(config.run.dir)
    found = setup.resume_point(config)
    title = "Trust-GRPO" if config.algorithm.name == "trust_grpo" else "GRPO"
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(config, title))
        with progress.phase("data"):
            processor = Processor(config.model.path, min_pixels=config.model.min_pixels, max_pixels=config.model.max_pixels)
            loader = Loader.open(config, processor)
            stack.callback(loader.close)
            held_out = open_eval(config, processor) if config.eval.every else []
        with progress.phase("policy"):
            policy = Policy.create(config, banned_ids=processor.banned_ids, temperature=config.rollout.temperature,
                                   reference=config.algorithm.kl_coef > 0, total_steps=setup.updates(config))
            stack.callback(policy.close)
            done = setup.restore(config, policy, loader, found)
        log = RunLog(run_dir, config, resume_step=done)
        stack.callback(log.close)
        setup.write_config(run_dir, config)
        if done is not None and done >= config.run.steps:
            summary.print_table(run_dir)
            return 0
        with progress.phase("engine"):
            rollout = open_rollout(config, stop_ids=processor.stop_ids, banned_ids=processor.banned_ids, vocab_size=processor.vocab_size,
                                   decode=processor.decode, device=policy.device, run_dir=run_dir)
            stack.callback(rollout.close)
            rewards = stack.enter_context(Rewards(config, device=policy.device))
        rooms = Rooms(config, loader, policy, rollout, rewards, progress, held_out)
        rollout.send(policy, version=done or 0)  # whatever the engine held before, from here on it holds this policy
        if done is None and config.eval.every:
            log.metrics(0, evaluate(rooms))
        for step in range((done or 0) + 1, config.run.steps + 1):
            metrics, rows = one_step(rooms, step)
            if config.eval.every and (step % config.eval.every == 0 or step == config.run.steps):
                metrics |= evaluate(rooms)
            log.samples(rows)
            log.metrics(step, metrics)
            progress.step(step, metrics)
            if setup.checkpoint_due(config, step):
                with progress.phase("save"):
                    checkpoint.save(policy, run_dir, step, setup.state(config, step, loader), keep=config.checkpoint.keep)
        with progress.phase("export"):
            policy.export(config.run.export or run_dir / "hf")
    write_report(run_dir)
    summary.print_table(run_dir)
    return 0


def one_step(rooms: Rooms, step: int) -> tuple[dict[str, float], list[dict]]:
    """One rollout step: its metrics and its rows of samples.jsonl."""
    config, policy, phase = rooms.config, rooms.policy, rooms.progress.phase
    started = time.perf_counter()
    with phase("rollout") as rollout:
        prompts = rooms.loader.next(config.rollout.prompts_per_step, replica=policy.replica, replicas=policy.replicas)
        groups = rooms.rollout.generate(prompts, n=config.rollout.n, step=step, seed=config.run.seed, temperature=config.rollout.temperature,
                                        max_new_tokens=config.rollout.max_new_tokens, on_group=rooms.rewards.start)
    with phase("reward") as reward:
        scores = rooms.rewards.score(groups)
    weighted, metrics = trust.advantages(scores, [len(g.responses) for g in groups], step - 1, config)
    with phase("update") as updating:
        metrics |= update(policy, groups, weighted.advantage, config, step)
    with phase("transfer") as transfer:
        sent = rooms.rollout.send(policy, version=step)
    tokens = sum(len(r.token_ids) for g in groups for r in g.responses)
    metrics |= samples.length_metrics(groups) | {f"transfer/{k}": v for k, v in sent.items()} | {
        "reward/grader_killed": scores.killed, "data/skipped": rooms.loader.skipped, "mem/peak_gib": memory.peak_gib(),
        "rollout/tokens_per_s": tokens / rollout.seconds, "train/tokens_per_s": tokens / updating.seconds,
        "time/rollout_s": rollout.seconds, "time/reward_s": reward.seconds, "time/update_s": updating.seconds,
        "time/transfer_s": transfer.seconds, "time/step_s": time.perf_counter() - started,
    }
    return metrics, samples.rows(groups, scores, weighted, metrics, step)


def update(policy: Policy, groups: list[types.Group], advantages: torch.Tensor, config: Config, step: int) -> dict[str, float]:
    """All optimizer updates of a rollout batch: mini-batches of whole groups, `algorithm.epochs` times over.

    With one update the policy's own log-probs are the old ones and no extra forward pass is needed; with several the
    old log-probs are taken once, before the first.
    """
    parts = [policy.pack(g, a) for g, a in setup.split(groups, advantages, config.algorithm.mini_batches)]
    if config.algorithm.mini_batches * config.algorithm.epochs > 1:
        for part in parts:
            for batch, logprob in zip(part, policy.logprobs(part), strict=True):
                batch.old_logprob = logprob
    if config.algorithm.kl_coef > 0:
        for part in parts:
            for batch, logprob in zip(part, policy.logprobs(part, reference=True), strict=True):
                batch.ref_logprob = logprob
    results = []
    for epoch in range(config.algorithm.epochs):
        for part in parts:
            count = policy.sum_over_replicas(losses.denominator(part, config))
            result = policy.update(part, losses.make_grpo_loss(config, count), entropy=True)
            results.append(losses.metrics(result.stats, config) | {"policy/grad_norm": result.grad_norm, "optim/lr": result.lr})
            if epoch == 0:
                _check_rollout_logprobs(results[-1], config, step)
    return {key: sum(r[key] for r in results) / len(results) if not key.endswith("_max") else max(r[key] for r in results) for key in results[0]}


def _check_rollout_logprobs(metrics: dict[str, float], config: Config, step: int) -> None:
    """The trainer's and the engine's log-probs of the sampled tokens must agree: the policy sampled is the policy trained."""
    limit, worst = config.rollout.max_logprob_diff, metrics["rollout/logprob_diff_max"]
    if limit is not None and config.algorithm.mini_batches == 1 and not worst <= limit:
        raise EngineError(f"step {step}: trainer and rollout engine disagree on a sampled token's log-prob by {worst:.3g} "
                          f"(rollout.max_logprob_diff = {limit:g}); the step was not saved")


def evaluate(rooms: Rooms) -> dict[str, float]:
    """Greedy answers on held-out data: eval/accuracy, eval/reasoning and both by problem type."""
    config = rooms.config
    with rooms.progress.phase("evaluate"):
        groups = rooms.rollout.generate(rooms.held_out, n=1, step=0, seed=config.run.seed, temperature=config.eval.temperature,
                                        max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens)
        return accuracy.metrics(accuracy.judge(groups, config.rewards))
