"""What every section gets: the device, a clock, and the MLPs that are measured."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .clock import Clock

Row = dict[str, Any]
Report = Callable[[dict[str, Any]], None]
Case = tuple[str, Callable[[], Iterator[Row]]]

_LARGE = {"Llama-3-8B": (4096, 14336), "Llama-3.2-1B": (2048, 8192)}


@dataclass
class Bench:
    """Attributes:
    report: sends {"row": ...} or {"begin": ...} at once, where a case cannot yield.
    mlps: hidden features and neurons of gated MLPs, by name, the most important first.
    tokens: of a batch; `tile` of a tile; `rank` of updates.
    """

    device: torch.device
    tiny: bool
    report: Report

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)
        self.tokens, self.tile, self.rank = (64, 16, 4) if self.tiny else (8192, 128, 16)
        self.mlps = {"tiny": (32, 96)} if self.tiny else _LARGE

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> str:
        """bf16; on a CPU fp32, as Triton's interpreter multiplies bfloat16 wrongly."""
        return "bf16" if self.on_gpu else "fp32"

    def layer(self, mlp: str, classes: bool, tokens: int | None = None) -> argparse.Namespace:
        """What `benchmarks.layer` is to measure."""
        hidden, neurons = self.mlps[mlp]
        return argparse.Namespace(
            tokens=tokens or self.tokens, hidden=hidden, intermediate=neurons, gated=True, active=None, tile=self.tile,
            dtype=self.dtype, rank=self.rank, classes=classes, device=self.device.type,
            rounds=2 if self.tiny else 15, warmup=1 if self.tiny else 3,
        )  # fmt: skip
