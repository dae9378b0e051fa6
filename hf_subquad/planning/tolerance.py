"""What `tolerance` means: how far predictions and gradients may move."""

from dataclasses import dataclass

from .fidelity import Fidelity

COSINE_PER_TOLERANCE = 10.0  # 1 - cosine of the gradient, for each unit of tolerance
DIVERGENCE_PER_TOLERANCE = 10.0  # nats: what context tokens miss shows in the divergence, but little in training
NOISE_PER_TOLERANCE = 50.0  # of the squared gradient: sampled rows change it in another direction in every step


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
