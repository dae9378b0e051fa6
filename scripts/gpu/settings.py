"""What was asked for. Light to import: the process that supervises needs no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

# In order of importance, with the share of the time that each may take of what all may take.
SHARES = {
    "device": 0.05, "correctness": 0.24, "layers": 0.24, "kernels": 0.14, "step": 0.16, "profile": 0.07, "sweep": 0.10,
}  # fmt: skip
OPTIONAL = ("sweep",)  # has no time of its own unless asked for


@dataclass(frozen=True)
class Settings:
    """Attributes:
    sections: in order.
    minutes: for all of them, the start of the process included.
    patience: seconds; a case that sends nothing for longer is stopped.
    broken: sections whose first case goes wrong on purpose, and how: raise, exit or hang.
    """

    output: Path
    sections: tuple[str, ...]
    minutes: float = 8.0
    sweep: bool = False
    tiny: bool = False
    device: Literal["cuda", "cpu"] = "cuda"
    vocabulary: int = 32000
    patience: float = 90.0
    broken: dict[str, str] = field(default_factory=dict)

    def share_until(self, section: str) -> float:
        """The share of the time at whose end a section is to be done; time that earlier ones leave is its own."""
        shares = {
            name: 0.0 if name in OPTIONAL and not self.sweep and len(self.sections) > 1 else SHARES[name]
            for name in self.sections
        }
        done = self.sections[: self.sections.index(section) + 1]
        return sum(shares[name] for name in done) / sum(shares.values())
