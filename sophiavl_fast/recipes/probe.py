"""Trainer against engine, while rollouts run ahead of the policy: their tokens are of older weights, so that a few others are sampled for the comparison.

Asked for right after a transfer and compared before the next update changes the policy, so that nobody waits for the engine, which has
requests of its own in flight.
"""
from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from sophiavl_fast.config import Config
from sophiavl_fast.errors import EngineError
from sophiavl_fast.policy import Policy
from sophiavl_fast.recipes import ranks
from sophiavl_fast.recipes.ahead import awaited
from sophiavl_fast.types import Group, Prompt, derive_seed

PROBE_TOKENS = 4    # the prompt, and tokens behind it; each waits for a step of all that the engine has in flight


class Probe:
    """Every rank has one and calls `compare`; the leads of the replicas sample."""

    def __init__(self, config: Config, policy: Policy, rollout: ranks.Lead | ranks.Follower) -> None:
        self._config, self._policy, self._rollout = config, policy, rollout
        self._thread = ThreadPoolExecutor(1, "probe")
        self._asked: Future[list[Group]] | None = None

    def ask(self, groups: Sequence[Group], step: int) -> None:
        """Have the first group's prompt answered anew, with the weights that the engine holds now. Peers have no groups."""
        if isinstance(self._rollout, ranks.Lead):
            self._asked = self._thread.submit(self._sample, self._rollout, groups[0].prompt, step)

    def compare(self, groups: Sequence[Group], step: int) -> float:
        """Largest log-prob difference of the tokens asked for (now, where nothing was), over all replicas.

        Raises EngineError beyond rollout.max_logprob_diff."""
        answered: list[Group] = []
        if not self._asked:
            self.ask(groups, step)
        if self._asked and isinstance(self._rollout, ranks.Lead):
            answered, self._asked = awaited(self._asked, self._rollout.tend), None
        self._rollout.end_round()
        batches = self._policy.pack(answered, None)
        pairs = zip(self._policy.logprobs(batches), batches, strict=True)
        worst = torch.stack([(ours.cpu() - batch.rollout_logprob).abs().max() for ours, batch in pairs]).max()     # NaN stays the largest
        found = float(self._policy.layout.max_over_replicas(worst))
        require_agreement(found, self._config, step)
        return found

    def close(self) -> None:
        """What is still asked for ends with the engine."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _sample(self, rollout: ranks.Lead, prompt: Prompt, step: int) -> list[Group]:
        return rollout.generate([prompt], n=1, step=0, seed=derive_seed(self._config.run.seed, "probe", step),
                                temperature=self._config.rollout.temperature, max_new_tokens=PROBE_TOKENS)


def require_agreement(worst: float, config: Config, step: int) -> None:
    """The trainer's and the engine's log-probs of the sampled tokens must agree: the policy that sampled is the policy trained. In a replay the recording
    stands for the engine."""
    limit = config.rollout.max_logprob_diff
    if limit is not None and not worst <= limit:
        if config.debug.replay:
            raise EngineError(f"step {step}: the policy differs from the one that sampled the recording '{config.debug.replay}', in a token's log-prob by "
                              f"{worst:.3g} (rollout.max_logprob_diff = {limit:g}): the recording run had another model, run.seed, optim.lr or loss, "
                              "or the rounding of another layout has added up; rollout.max_logprob_diff=null goes on; this step is in no checkpoint")
        raise EngineError(f"step {step}: trainer and rollout engine disagree on a sampled token's log-prob by {worst:.3g} "
                          f"(rollout.max_logprob_diff = {limit:g}); this step is in no checkpoint")
