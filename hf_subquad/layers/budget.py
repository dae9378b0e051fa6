"""What one MLP spends on the tokens of a batch. Pure data."""

from dataclasses import dataclass
from typing import Literal

TokenClass = Literal["predicted", "context"]


@dataclass(frozen=True)
class Budget:
    """Neurons for each class of tokens, and how much of the gradient passes back.

    Attributes:
        predicted: neurons for tokens at which the loss looks, and for all tokens where classes are not known;
            None: all.
        context: neurons for the other tokens that are not padding, 0 or more; None: all.
        gradient: share, in (0, 1], of the squared output gradient that the rows hold which pass it back into the MLP,
            those with the largest norms first. With 1 only rows without any gradient are skipped, which is exact.
    """

    predicted: int | None = None
    context: int | None = None
    gradient: float = 1.0

    @classmethod
    def uniform(cls, k: int | None) -> "Budget":
        """The same k neurons for every token."""
        return cls(k, k)

    def neurons(self, token_class: TokenClass) -> int | None:
        """Neurons for tokens of a class; None: all."""
        return self.predicted if token_class == "predicted" else self.context

    def counts(self, neurons: int) -> tuple[int, int]:
        """Neurons for predicted and for context tokens, of an MLP of m."""
        predicted, context = (neurons if k is None else k for k in (self.predicted, self.context))
        return predicted, context

    @property
    def exact(self) -> bool:
        """All neurons for every token, and the whole gradient."""
        return self.predicted is None and self.context is None and self.gradient >= 1
