"""Differentiable ops of the trainer, usable in any other; imported as `sophiavl_fast.kernels`.

Each op's file holds its contract and checks; `dispatch` picks an implementation, and `reference_*` are the
plain-PyTorch oracles that every other one is checked against.
"""
from .grpo_loss import grpo_loss
from .linear_logprob import linear_logprob
from .logits_logprob import logits_logprob
from .stats import STATS, SUMS
from .trust_advantage import Trust, trust_advantage

__all__ = ["STATS", "SUMS", "Trust", "grpo_loss", "linear_logprob", "logits_logprob", "trust_advantage"]
