"""Rewards: Group -> Scores. Outcome by problem type in outcome.py, the judge of the reasoning in thinking/."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sophiavl_fast.rewards.rewards import Rewards

__all__ = ["Rewards"]


def __getattr__(name: str) -> Any:
    """`Rewards` is imported when asked for: grader processes import this package too, and must not pay for torch."""
    if name != "Rewards":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from sophiavl_fast.rewards.rewards import Rewards

    return Rewards
