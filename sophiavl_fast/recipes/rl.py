"""Trust-GRPO (SophiaVL-R1, arXiv 2505.17018), top to bottom like the paper.

    prompts -> groups of n responses -> outcome and thinking scores -> trust-weighted advantages -> update -> transfer

Departures from the published method, each a config line: losses are global token means (`algorithm.aggregate`),
samples are drawn from exactly the distribution that is differentiated (top_p 1), and a thinking score that could not
be had is NaN and drops its group's thinking term (`thinking.quorum`) instead of counting as 0.

Step s of run.steps (from 1) is computed from the policy after s - 1 steps; annealing counts steps done, from 0.
Step 0 in the metrics is the evaluation before any update. Every rank runs this loop; the leads of the replicas (tensor
rank 0, first stage) have prompts, groups and scores in their hands, their peers have none and take part in the policy's work.
"""
from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from sophiavl_fast import types
from sophiavl_fast.algorithms import losses
from sophiavl_fast.config import Config
from sophiavl_fast.data.loader import Loader, open_eval
from sophiavl_fast.data.processor import Processor
from sophiavl_fast.evaluate import accuracy
from sophiavl_fast.monitor import Progress, RunLog, memory, summary, write_report
from sophiavl_fast.policy import Policy
from sophiavl_fast.recipes import judge_server, preflight, probe, ranks, samples, sampling, setup
from sophiavl_fast.recipes.ahead import Ahead
from sophiavl_fast.recipes.muster import Muster, refusals
from sophiavl_fast.recipes.rooms import Rooms, open_rooms


def train(config: Config) -> int:
    """Run the recipe to run.steps; returns the exit code. Goes on from the newest checkpoint unless run.resume says never."""
    run_dir = Path(config.run.dir)
    with refusals(run_dir):
        found = setup.resume_point(config)
        setup.refuse_unreadable(config, found)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(config, "Trust-GRPO" if config.algorithm.name == "trust_grpo" else "GRPO"))
        progress.watch = stack.enter_context(Muster(run_dir, config.policy.control_timeout_s)).phase
        with progress.phase("data"):
            preflight.refuse_absent(config)
            if setup.steps_left(config, found):
                preflight.refuse_other_models(config)
            processor = Processor(config.model.path, min_pixels=config.model.min_pixels, max_pixels=config.model.max_pixels)
            loader = Loader.open(config, processor, limits=preflight.training_limits(config))
            stack.callback(loader.close)
            setup.restore_stream(loader, found)
            asked = config.eval.every and setup.steps_left(config, found)
            held_out = open_eval(config, processor, limits=preflight.held_out_limits(config)) if asked else []
        with progress.phase("policy"):
            policy = Policy.create(config, banned_ids=processor.banned_ids, temperature=config.rollout.temperature,
                                   reference=config.algorithm.kl_coef > 0, total_steps=setup.updates(config))
            stack.callback(policy.close)
            done = setup.restore(config, policy, loader, found)
            progress.resume(done or 0)
        log = ranks.open_log(run_dir, config, done, found)
        stack.callback(log.close)
        setup.write_config(run_dir, config)
        if (done or 0) < config.run.steps:
            with open_rooms(config, processor, loader, policy, progress, held_out) as rooms:
                loop(rooms, log, done)
        with progress.phase("export"):  # also after a kill between the last checkpoint and here
            policy.export(config.run.export or run_dir / "hf")
    if setup.is_first_rank():
        write_report(run_dir)
        summary.print_table(run_dir)
    return 0


def loop(rooms: Rooms, log: RunLog | ranks.NoLog, done: int | None) -> None:
    """Every step from the checkpoint's (None: from the evaluation before the first) to run.steps."""
    config, progress = rooms.config, rooms.progress
    with progress.phase("transfer"):
        rooms.rollout.send(rooms.policy, version=done or 0)  # whatever the engine held before, from here on it holds this policy
    if done is None and config.eval.every:
        first = evaluate(rooms)
        log.metrics(0, first)
        progress.step(0, first)
    with rollouts_ahead(rooms, first=(done or 0) + 1):
        for step in range((done or 0) + 1, config.run.steps + 1):
            finish(rooms, log, step, *one_step(rooms, step))


@contextmanager
def rollouts_ahead(rooms: Rooms, first: int) -> Iterator[None]:
    """Sample ahead of the policy within the block, where rollout.staleness says so. Scoring begins as each group is finished, beside the update."""
    with ExitStack() as stack:
        if rooms.config.rollout.staleness:
            rooms.probe = probe.Probe(rooms.config, rooms.policy, rooms.rollout)
            stack.callback(rooms.probe.close)
            if rewards := rooms.rewards:
                rooms.ahead = Ahead(rooms.loader, rooms.draw, lambda prompts, step: rooms.generate(prompts, step, rewards.start),
                                    depth=rooms.config.rollout.staleness, first=first, last=rooms.config.run.steps)
                stack.callback(rooms.ahead.close)
        yield


def finish(rooms: Rooms, log: RunLog | ranks.NoLog, step: int, metrics: dict[str, float], rows: list[dict]) -> None:
    """What follows a step where it is due: evaluation, the log, a checkpoint."""
    config, progress = rooms.config, rooms.progress
    if evaluation_due(config, step):
        metrics |= evaluate(rooms)
    log.samples(rows)
    alarms = log.metrics(step, metrics)
    progress.step(step, metrics)
    for line in alarms:
        progress.print(f"step {step}: {line}")
    if setup.checkpoint_due(config, step):
        with ranks.engines_asleep(rooms.rollout, rooms.policy, progress):
            with progress.phase("save"):
                rooms.saver.save(step, setup.state(config, step, rooms.drawn(step), skipped=int(metrics.get("data/skipped", 0))))
            rooms.policy.rest()  # the optimizer's state was needed


def evaluation_due(config: Config, step: int) -> bool:
    return bool(config.eval.every) and (step % config.eval.every == 0 or step == config.run.steps)


def one_step(rooms: Rooms, step: int) -> tuple[dict[str, float], list[dict]]:
    """One rollout step: its metrics and its rows of samples.jsonl, of all replicas (both empty on peers)."""
    config, policy, phase = rooms.config, rooms.policy, rooms.progress.phase
    started = time.perf_counter()
    groups: list[types.Group] = []
    metrics: dict[str, float] = {}
    advantage: torch.Tensor | None = None
    if rooms.judge:
        rooms.judge.wake()
    with phase("rollout") as rollout:
        if rooms.ahead:
            groups, busy = rooms.ahead.take(step, rooms.rollout.tend)
            metrics |= ahead_metrics(groups, step, busy)
        elif rooms.rewards:
            groups = rooms.generate(rooms.draw(), step, rooms.rewards.start)
    with judge_server.judging(rooms.judge) as doubt:
        with phase("reward") as reward:
            if rooms.rewards:
                seen = sampling.judged(rooms, groups, rooms.rewards.score(groups), step)
        if rooms.rewards and config.rollout.resample:
            seen, more_rollout, more_reward = sampling.resampled(rooms, seen, step)
            rollout.seconds, reward.seconds = rollout.seconds + more_rollout, reward.seconds + more_reward
        doubt.unscored = bool(rooms.rewards and seen.metrics["reward/unscored"])
    if rooms.rewards:
        groups, mine = seen.groups, seen.everyone.rows(policy.replica)
        metrics |= seen.metrics
        advantage = seen.weighted.advantage[mine]
    if rooms.judge and config.thinking.sleep:
        rooms.judge.sleep()
    rooms.rollout.end_round()
    if rooms.probe:
        compare(rooms, groups, step, metrics)
    with ranks.engines_asleep(rooms.rollout, policy, rooms.progress) as asleep, phase("update") as updating:
        if not config.debug.rollout_only:
            metrics |= update(rooms, groups, advantage, step)
            policy.rest()
    with memory.released_meanwhile(), phase("transfer") as transfer:
        sent = rooms.rollout.send(policy, version=step)
    if rooms.probe:
        rooms.probe.ask(groups, step)
        if evaluation_due(config, step) or setup.checkpoint_due(config, step):    # nothing is measured or kept of a transfer in doubt
            compare(rooms, groups, step, metrics)
    if not rooms.rewards:
        return {}, []
    rows = samples.rows(groups, seen.scores, seen.weighted, mine, metrics["trust/weight"], step, policy.replica * len(groups))
    parts = policy.gather_replicas((rows, rooms.rollout.counters()))
    rows = [row for part, _ in parts for row in part]
    lengths = samples.length_metrics(rows)
    metrics |= lengths | ranks.engine_metrics(sent, [found for _, found in parts]) | memory.metrics() | {
        "reward/grader_killed": seen.everyone.scores.killed, "data/skipped": seen.everyone.skipped,
        "rollout/tokens_per_s": lengths["response/tokens"] / (metrics.get("rollout/busy_s", rollout.seconds) or math.nan),
        "train/tokens_per_s": math.nan if config.debug.rollout_only else lengths["response/tokens"] / updating.seconds,
        "time/rollout_s": rollout.seconds, "time/reward_s": reward.seconds, "time/update_s": updating.seconds,
        "time/transfer_s": transfer.seconds, "time/step_s": time.perf_counter() - started, **({"time/sleep_s": asleep.seconds} if asleep else {}),
    }
    return metrics, rows


def update(rooms: Rooms, groups: list[types.Group], advantages: torch.Tensor | None, step: int) -> dict[str, float]:
    """All optimizer updates of a rollout batch: mini-batches of whole groups, `algorithm.epochs` times over.

    With one update the policy's own log-probs are the old ones and no extra forward pass is needed; with several the
    old log-probs are taken once, before the first.
    """
    policy, config, found = rooms.policy, rooms.config, {}
    a = config.algorithm
    parts = [policy.pack(g, rows) for g, rows in setup.split(groups, advantages, a.mini_batches)]
    for part in parts:
        if a.mini_batches * a.epochs > 1:
            for batch, logprob in zip(part, policy.logprobs(part), strict=True):
                batch.old_logprob = logprob
        if a.kl_coef > 0:
            for batch, logprob in zip(part, policy.logprobs(part, reference=True), strict=True):
                batch.ref_logprob = logprob
    if config.debug.compare_hf and step % config.debug.compare_every == 0:
        found["debug/hf_logprob_diff_max"] = _worst([policy.compare_hf(part, policy.logprobs(part)) for part in parts])
    results = []
    for _ in range(a.epochs):
        for part in parts:
            count = policy.sum_over_replicas(losses.denominator(part, config))
            result = policy.update(part, losses.make_grpo_loss(config, count), entropy=True, active=lambda batch: losses.active_rows(batch, config))
            results.append(losses.metrics(result.stats, config) | {"policy/grad_norm": result.grad_norm, "optim/lr": result.lr})
    found |= {key: (_worst if key.endswith("_max") else _mean)([r[key] for r in results]) for key in results[0]}
    if not config.rollout.staleness:  # else most tokens are of an older version, see probe.py
        probe.require_agreement(found["rollout/logprob_diff_max"], config, step)
    return found


def compare(rooms: Rooms, groups: list[types.Group], step: int, metrics: dict[str, float]) -> None:
    """How far trainer and engine are apart after the latest transfer, and how long it took to find out, on top of what the step's metrics hold of it."""
    assert rooms.probe
    with rooms.progress.phase("probe") as probing:
        worst = rooms.probe.compare(groups, step)
    metrics["rollout/probe_diff_max"] = max(worst, metrics.get("rollout/probe_diff_max", 0.0))
    metrics["time/probe_s"] = probing.seconds + metrics.get("time/probe_s", 0.0)


def ahead_metrics(groups: list[types.Group], step: int, busy: float) -> dict[str, float]:
    """How far behind the policy the tokens of this replica were sampled, and how long the engines worked on them."""
    lag = [step - 1 - version for g in groups for r in g.responses for version in r.weight_versions]
    return {"rollout/busy_s": busy, "rollout/lag_mean": _mean(lag), "rollout/lag_max": max(lag)}


def _worst(values: list[float]) -> float:
    """The largest, NaN where any is NaN."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def evaluate(rooms: Rooms) -> dict[str, float]:
    """Greedy answers on held-out data: eval/accuracy, eval/reasoning and both by problem type. Replicas share the questions."""
    config, policy = rooms.config, rooms.policy
    with rooms.progress.phase("evaluate"):
        if not rooms.rewards:
            rooms.rollout.end_round()
            return {}
        groups = rooms.rollout.generate(rooms.held_out[policy.replica::policy.replicas], n=1, step=0, seed=config.run.seed,
                                        temperature=config.eval.temperature,
                                        max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens)
        rooms.rollout.end_round()
        judged = policy.gather_replicas(accuracy.judge(groups, config.rewards))
        return accuracy.metrics(j for part in judged for j in part)
