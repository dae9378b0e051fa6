"""What `tolerance` means: how far predictions and gradients may move."""

from dataclasses import dataclass

from ..config import COSINE_PER_TOLERANCE, DIVERGENCE_PER_TOLERANCE, NOISE_PER_TOLERANCE
from .fidelity import Fidelity


@dataclass(frozen=True)
class Limits:
    """Attributes:
    divergence: at most, of the predictions, in nats per predicted token.
    lost: at most, the share of the squared gradient that points elsewhere, 1 - cosine^2, with all its rows.
    noise: at most, the expected squared error by sampled rows, as a share of the squared gradient.
    """

    divergence: float
    lost: float
    noise: float

    @classmethod
    def of(cls, tolerance: float) -> "Limits":
        angle = min(1.0, COSINE_PER_TOLERANCE * tolerance)  # 1 - cosine
        return cls(DIVERGENCE_PER_TOLERANCE * tolerance, angle * (2 - angle), NOISE_PER_TOLERANCE * tolerance)

    def spent(self, found: Fidelity) -> float:
        """Share of the limits that is used; above 1, a limit is exceeded."""
        return max(found.divergence / self.divergence, found.lost / self.lost)
