"""The eleven score strings 0.0, 0.1, ..., 1.0 as token sequences, and the distribution that a model's logits give them.

P(score) is the product of its tokens' probabilities, divided by the sum over all eleven: what the model would reply, given
that it replies with a score. Their tokens share prefixes ('0' and '.' with most tokenizers), so that a few positions hold
all the logits needed: the one after the prompt, and those after each proper prefix.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from sophiavl_fast.errors import UserError

TEXTS = tuple(f"{i / 10:.1f}" for i in range(11))
VALUES = tuple(i / 10 for i in range(11))


class ScoreTrie:
    """Token ids of `reply` for every score. `lead`: the tokens before the scores differ; `paths`: what must be fed after it.

    A path is a longest proper prefix of some score ('0', '.'); `paths` may be empty where every score is one token.
    """

    def __init__(self, encode: Callable[[str], list[int]], reply: str) -> None:
        replies = [encode(reply.replace("{score}", text)) for text in TEXTS]
        lead = common_prefix(replies)
        tail = common_prefix([r[lead:][::-1] for r in replies])
        self.lead = replies[0][:lead]
        self.scores = [r[lead:len(r) - tail] for r in replies]
        if len({tuple(s) for s in self.scores}) < len(TEXTS) or not all(self.scores):
            raise UserError("thinking.path: the judge's tokenizer does not tell the scores 0.0 to 1.0 apart")
        prefixes = {tuple(s[:-1]) for s in self.scores if len(s) > 1}
        self.paths = sorted(p for p in prefixes if not any(q != p and q[:len(p)] == p for q in prefixes))

    def distribution(self, first: Tensor, after: Tensor | None) -> tuple[Tensor, Tensor]:
        """Probabilities [B, 11] of the scores and their mass [B] in the model's whole vocabulary, fp32.

        first [B, V]: logits after the lead; after [B, paths, L, V]: logits after each token of each path, None without paths.
        """
        root = first.float().log_softmax(-1)
        later = torch.empty(0) if after is None else after.float().log_softmax(-1)
        columns = []
        for score in self.scores:
            total = root[:, score[0]]
            if len(score) > 1:
                path = next(i for i, p in enumerate(self.paths) if list(p[:len(score) - 1]) == score[:-1])
                for depth, token in enumerate(score[1:]):
                    total = total + later[:, path, depth, token]
            columns.append(total)
        logits = torch.stack(columns, dim=1)
        return logits.softmax(-1), logits.logsumexp(-1).exp()


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many first tokens all rows share."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows)))


def expectation(probabilities: Tensor) -> Tensor:
    """Mean score [B] of distributions [B, 11]."""
    return probabilities @ torch.tensor(VALUES, dtype=probabilities.dtype, device=probabilities.device)


def draw(probabilities: Tensor, seeds: Any) -> list[float]:
    """One score for each seed from one distribution [11], each from a generator of its own."""
    weights = probabilities.cpu()
    picks = [torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return [VALUES[int(i)] for i in picks]
