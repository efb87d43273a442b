"""The soft overlong penalty (DAPO, arXiv 2503.14476, eq. 13): a reward for ending in time, added to the outcome."""
from __future__ import annotations

import torch
from torch import Tensor

from sophiavl_fast.config import Config
from sophiavl_fast.types import Group


def penalty(lengths: Tensor, longest: int, cache: int) -> Tensor:
    """lengths [B] of responses in tokens -> [B] fp32: 0 up to longest - cache, falling linearly to -1 at `longest`, -1 beyond."""
    return ((longest - cache - lengths.double()) / cache).clamp(-1, 0).float()


def overlong(groups: list[Group], config: Config) -> Tensor | None:
    """[B] for the responses of the groups in order; None where rewards.overlong_cache is 0. A response that was cut at rollout.max_new_tokens
    has that length, so that by default it gets -1."""
    if not config.rewards.overlong_cache:
        return None
    lengths = torch.tensor([len(r.token_ids) for g in groups for r in g.responses], dtype=torch.int64)
    longest = config.rollout.max_new_tokens if config.rewards.overlong_max is None else config.rewards.overlong_max
    return penalty(lengths, longest, config.rewards.overlong_cache)
