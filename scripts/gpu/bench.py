"""What every section gets: the device, a clock, and the MLPs that are measured."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hf_subquad import SubquadConfig

from .clock import Clock

Row = dict[str, Any]
Case = tuple[str, Callable[[], Iterator[Row]]]


@dataclass(frozen=True)
class Shape:
    """An MLP from `hidden` features to `intermediate` neurons and back; gated with SiLU and without biases (Llama), or
    ReLU with biases (OPT)."""

    name: str
    hidden: int
    intermediate: int
    gated: bool

    @property
    def active(self) -> int:
        """m ** 0.8 neurons, the sparsity level of the paper."""
        return SubquadConfig().active_neurons(self.intermediate)


@dataclass
class Bench:
    """Attributes:
    main, other: the MLPs that are measured.
    tokens: of a batch; `tile` of a tile; `rank` of updates.
    """

    device: torch.device
    tiny: bool

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)
        self.tokens, self.tile, self.rank = (40, 16, 4) if self.tiny else (8192, 128, 16)
        if self.tiny:
            self.main, self.other = Shape("tiny gated", 32, 96, True), Shape("tiny ReLU", 32, 128, False)
        else:
            self.main, self.other = Shape("Llama-3-8B", 4096, 14336, True), Shape("OPT-6.7B", 4096, 16384, False)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16; on a CPU float32, as Triton's interpreter multiplies bfloat16 wrongly."""
        return torch.bfloat16 if self.on_gpu else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]
