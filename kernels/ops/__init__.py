"""Differentiable ops of the trainer, usable in any other; imported as `sophiavl_fast.kernels`."""
from .linear_logprob import linear_logprob
from .logits_logprob import logits_logprob

__all__ = ["linear_logprob", "logits_logprob"]
