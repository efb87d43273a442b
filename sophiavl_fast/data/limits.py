"""What a run asks of every record beyond being readable: images and length that its engine takes, and what its recipe learns from."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sophiavl_fast.errors import UserError

if TYPE_CHECKING:
    from sophiavl_fast.data.dataset import Example


@dataclass(frozen=True, slots=True)
class Limits:
    """Held against each record wherever it is read, so that one the run would end at is a bad record before it starts; None asks for nothing.

    images: of a record, at most; sequence: prompt plus `new_tokens`, at most, and `advice`: what else to do about a longer one;
    check: of the recipe's own, raises UserError.
    """

    images: int | None = None
    sequence: int | None = None
    new_tokens: int = 0
    advice: str = ""
    check: Callable[[Example], None] | None = None

    def refuse(self, example: Example) -> None:
        """UserError for an example with too many images, or one that the recipe cannot use."""
        if self.images is not None and len(example.images) > self.images:
            raise UserError(f"{len(example.images)} images; the rollout engine takes at most {self.images} a prompt")
        if self.check:
            self.check(example)

    def refuse_long(self, length: int) -> None:
        """UserError for a prompt of so many tokens that leaves no room for its response."""
        if self.sequence is not None and length + self.new_tokens > self.sequence:
            raise UserError(f"the prompt has {length} tokens: with {self.new_tokens} new ones more than the {self.sequence} of {self.advice}")
