"""What a step of RL needs, open: the loader, the policy, the engine, the rewards and what shows and saves the run."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from sophiavl_fast import types
from sophiavl_fast.config import Config
from sophiavl_fast.data.loader import Loader
from sophiavl_fast.data.processor import Processor
from sophiavl_fast.monitor import Progress
from sophiavl_fast.policy import Policy
from sophiavl_fast.policy.saver import Saver
from sophiavl_fast.recipes import judge_server, ranks
from sophiavl_fast.recipes.ahead import Ahead
from sophiavl_fast.recipes.judge_server import JudgeServer
from sophiavl_fast.recipes.probe import Probe
from sophiavl_fast.rewards import Rewards
from sophiavl_fast.rollout import open_rollout
from sophiavl_fast.types import derive_seed


@dataclass(slots=True)
class Rooms:
    """Everything a step needs, open. Peers of a lead have a rollout that only follows the weights, and no rewards."""

    config: Config
    loader: Loader
    policy: Policy
    rollout: ranks.Lead | ranks.Follower
    rewards: Rewards | None
    progress: Progress
    held_out: list[types.Prompt]
    saver: Saver
    judge: JudgeServer | None = None
    ahead: Ahead | None = None
    probe: Probe | None = None

    def draw(self) -> list[types.Prompt]:
        """This replica's prompts of the next step."""
        return self.loader.next(self.config.rollout.prompts_per_step, replica=self.policy.replica, replicas=self.policy.replicas)

    def drawn(self, step: int) -> dict[str, Any]:
        """The loader's state after the prompts of `step` were drawn, those of later steps not: what a checkpoint of `step` keeps."""
        return self.ahead.loader_state(step) if self.ahead else self.loader.state()

    def generate(self, prompts: list[types.Prompt], step: int, on_group: Callable[[types.Group], None] | None = None, turn: int = 0) -> list[types.Group]:
        """Their groups; `turn` counts the rounds of dynamic sampling within a step, so that a prompt that comes again is answered anew."""
        r, seed = self.config.rollout, self.config.run.seed
        return self.rollout.generate(prompts, n=r.n, step=step, seed=derive_seed(seed, "resample", turn) if turn else seed,
                                     temperature=r.temperature, max_new_tokens=r.max_new_tokens, on_group=on_group)


@contextmanager
def open_rooms(config: Config, processor: Processor, loader: Loader, policy: Policy, progress: Progress, held_out: list[types.Prompt]) -> Iterator[Rooms]:
    """The engine and the rewards beside what is open already; on peers of a lead what stands for them."""
    policy.rest()
    policy.layout.wait("engine")  # which may stand on GPUs of several ranks, and looks for its memory when it starts
    with ExitStack() as stack:
        saver = stack.enter_context(Saver(policy, config.run.dir, keep=config.checkpoint.keep, background=config.checkpoint.background))
        if not policy.is_lead:
            yield Rooms(config, loader, policy, ranks.Follower(policy), None, progress, held_out, saver)
            return
        with progress.phase("engine"):
            rollout = open_rollout(config, stop_ids=processor.stop_ids, banned_ids=processor.banned_ids, vocab_size=processor.vocab_size,
                                   decode=processor.decode, device=policy.device, run_dir=config.run.dir, replica=policy.replica, replicas=policy.replicas)
            stack.callback(rollout.close)
        with progress.phase("judge"):
            judge, key = stack.enter_context(judge_server.served(config, policy))
            rewards = stack.enter_context(Rewards(config, device=policy.device, judge_key=key))
        yield Rooms(config, loader, policy, ranks.Lead(rollout, policy), rewards, progress, held_out, saver, judge)
