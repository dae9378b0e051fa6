"""What every section gets, and what it gives: cases, each a name and a function that yields rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .clock import Clock
from .shapes import FULL, TINY, Sizes

Row = dict[str, Any]
Case = tuple[str, Callable[[], Iterator[Row]]]

NEEDS_CUDA = "needs CUDA"


@dataclass
class Bench:
    """Attributes:
    vocabulary: of the model that a Trainer trains.
    kept: what a section leaves to the next, by name.
    """

    device: torch.device
    tiny: bool
    vocabulary: int
    kept: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def sizes(self) -> Sizes:
        return TINY if self.tiny else FULL

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16; on a CPU float32, as Triton's interpreter multiplies bfloat16 wrongly."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, made at the first call under that name."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]
