"""How much one MLP may compute for the tokens of a batch. Pure data."""

from dataclasses import dataclass
from typing import Literal

TokenClass = Literal["predicted", "context"]


@dataclass(frozen=True)
class Budget:
    """Neurons for each class of tokens, and how much of the gradient is propagated back.

    Attributes:
        predicted: number of neurons for tokens at which the loss is computed, and for all tokens where classes are
            not known; None: all neurons.
        context: number of neurons for the other tokens that are not padding, 0 or more; None: all neurons.
        gradient: in (0, 1]; the output gradient is propagated back through a sample of its rows, whose expected squared
            error is 1 minus this, as a share of the squared gradient. With 1, at most rows of zeros are skipped.
    """

    predicted: int | None = None
    context: int | None = None
    gradient: float = 1.0

    def neurons(self, token_class: TokenClass) -> int | None:
        """Neurons for tokens of a class; None: all."""
        return self.predicted if token_class == "predicted" else self.context

    def counts(self, neurons: int) -> tuple[int, int]:
        """Numbers of neurons for predicted and for context tokens, in an MLP of m neurons."""
        predicted, context = (neurons if k is None else k for k in (self.predicted, self.context))
        return predicted, context

    @property
    def all_neurons(self) -> bool:
        """Whether every token has all neurons."""
        return self.predicted is None and self.context is None

    @property
    def exact(self) -> bool:
        """Whether every token has all neurons, and the whole gradient is propagated back."""
        return self.all_neurons and self.gradient >= 1
