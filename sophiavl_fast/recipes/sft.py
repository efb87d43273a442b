"""Supervised fine-tuning on responses, with the same engine as RL: the warm start, and the thinking reward model's training.

The loss is the mean negative log-likelihood over all response tokens of the step, on every replica together; with `sft.soft_score` the
target is a distribution over scores.
"""
from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from sophiavl_fast.algorithms import losses
from sophiavl_fast.config import Config, Sft
from sophiavl_fast.data.dataset import Example as Record
from sophiavl_fast.data.limits import Limits
from sophiavl_fast.data.loader import Loader
from sophiavl_fast.data.processor import Processor
from sophiavl_fast.errors import UserError
from sophiavl_fast.monitor import Progress, memory, write_report
from sophiavl_fast.policy import Policy
from sophiavl_fast.policy.saver import Saver
from sophiavl_fast.recipes import preflight, ranks, setup
from sophiavl_fast.recipes.muster import Muster, refusals
from sophiavl_fast.types import Group, Prompt, Response


def train(config: Config) -> int:
    """Run `run.steps` optimizer steps of `sft.batch_size` records; returns the exit code."""
    run_dir = Path(config.run.dir)
    with refusals(run_dir):
        found = setup.resume_point(config)
        setup.refuse_unreadable(config)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(config, "SFT"))
        progress.watch = stack.enter_context(Muster(run_dir, config.policy.control_timeout_s)).phase
        with progress.phase("data"):
            preflight.refuse_absent(config)
            processor = Processor(config.model.path, min_pixels=config.model.min_pixels, max_pixels=config.model.max_pixels)
            loader = Loader.open(config, processor, limits=Limits(check=lambda record: refuse_targetless(record, config.sft)))
            stack.callback(loader.close)
            setup.restore_stream(loader, found)
        with progress.phase("policy"):
            policy = Policy.create(config, reference=False, total_steps=setup.updates(config))
            stack.callback(policy.close)
            done = setup.restore(config, policy, loader, found)
            progress.resume(done or 0)
        log = ranks.open_log(run_dir, config, done, found)
        stack.callback(log.close)
        setup.write_config(run_dir, config)
        saver = stack.enter_context(Saver(policy, run_dir, keep=config.checkpoint.keep, background=config.checkpoint.background))
        for step in range((done or 0) + 1, config.run.steps + 1):
            metrics = one_step(config, loader, processor, policy, progress)
            log.metrics(step, metrics)
            progress.step(step, metrics)
            if setup.checkpoint_due(config, step):
                with progress.phase("save"):
                    saver.save(step, setup.state(config, step, loader.state(), skipped=int(metrics["data/skipped"])))
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
        examples = [example(p, processor, config.sft) for p in prompts]
        batches = policy.pack([e.group for e in examples], torch.tensor([w for e in examples for w in e.weights]))
    with progress.phase("update") as update:
        mine = torch.stack([losses.weight_of_tokens(batches), torch.tensor(loader.skipped, dtype=torch.float64)])
        count, skipped = policy.sum_over_replicas(mine).unbind()
        result = policy.update(batches, losses.sft_loss(count))
    return losses.sft_metrics(result.stats) | {
        "policy/grad_norm": result.grad_norm, "optim/lr": result.lr, "data/skipped": int(skipped),
        "train/tokens_per_s": float(count) / update.seconds, "time/update_s": update.seconds, "time/step_s": time.perf_counter() - started,
    } | memory.metrics()


class Example(NamedTuple):
    """What one record teaches: responses to its prompt, and the weight of each in the loss (they sum to 1)."""

    group: Group
    weights: list[float]


def example(prompt: Prompt, processor: Processor, sft: Sft) -> Example:
    """A record's target: its trace and answer, or its answer alone (tagged or bare), closed by end-of-text.

    With sft.soft_score the answer is a distribution: the two nearest tenths, weighted so that their mean is the record's exact score. Both
    responses in one group with the cross-entropy weighted alike are a soft target at the token where they part, whatever the tokenizer.
    Raises UserError for a record without what the target needs.
    """
    refuse_targetless(prompt, sft)
    answers = [(prompt.gold, 1.0)] if sft.soft_score is None else tenths(prompt, sft.soft_score)
    responses = []
    for answer, _ in answers:
        text = {"process": f"{prompt.process}<answer>{answer}</answer>", "solution": answer, "answer": f"<answer>{answer}</answer>"}[sft.target]
        ids = [*processor.tokenizer(text, add_special_tokens=False)["input_ids"], processor.stop_ids[0]]
        responses.append(Response(token_ids=ids, logprobs=[0.0] * len(ids), text=text, finish_reason="stop", seed=0, weight_versions=[0] * len(ids)))
    return Example(Group(prompt=prompt, responses=responses), [weight for _, weight in answers])


def refuse_targetless(record: Prompt | Record, sft: Sft) -> None:
    """UserError for a record without what `sft.target` and `sft.soft_score` learn from."""
    if sft.target == "process" and not record.process:
        raise UserError(f"record {record.id} has no 'process' to learn from; use sft.target=solution")
    if sft.soft_score is not None:
        tenths(record, sft.soft_score)


def tenths(prompt: Prompt | Record, field: str) -> list[tuple[str, float]]:
    """The one or two nearest tenths of the score in the record's `field`, with weights whose mean score is the score itself.

    Raises UserError where it is no number in [0, 1], or is not what the record's solution was rounded from.
    """
    score = prompt.record.get(field)
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= 1:
        raise UserError(f"record {prompt.id}: '{field}' is {score!r}, but sft.soft_score = {field} wants a number in [0, 1] there")
    try:
        agrees = abs(float(prompt.gold) - score) < 0.1
    except ValueError:
        agrees = False
    if not agrees:
        raise UserError(f"record {prompt.id}: its solution is '{prompt.gold}' but its '{field}' is {score:g}: no rounding makes one of the other")
    low = min(int(score * 10 + 1e-6), 9)
    share = score * 10 - low
    return [(f"{tenth / 10:.1f}", weight) for tenth, weight in ((low, 1 - share), (low + 1, share)) if weight > 1e-6]
