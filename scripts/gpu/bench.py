"""What every section gets: the device, a clock, the MLPs that are measured, and what one leaves to the next."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.layer import GatedMLP, PlainMLP
from torch import Tensor, nn

from hf_subquad import SubquadConfig, patch_model

from .clock import Clock

Row = dict[str, Any]
Case = tuple[str, Callable[[], Iterator[Row]]]

NEEDS_CUDA = "needs CUDA"


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
    kept: what a section leaves to the next, by name.
    """

    device: torch.device
    tiny: bool
    kept: dict[str, Any] = field(default_factory=dict)

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

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, made at the first call under that name."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def sparse_mlp(self, shape: Shape, dtype: torch.dtype) -> nn.Module:
        """A patched MLP with random weights, made on the device, that computes `shape.active` neurons a tile."""
        torch.manual_seed(0)
        with torch.device(self.device):
            layer = (GatedMLP if shape.gated else PlainMLP)(shape.hidden, shape.intermediate).to(dtype)
        config = SubquadConfig(rank=self.rank, tile_size=self.tile, active=shape.active, backend="triton")
        return patch_model(layer, config).train()

    def batch(self, shape: Shape, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Normalised random tokens [N, d] that require a gradient, and the gradient of the MLP's output [N, d]."""
        x = torch.randn(self.tokens, shape.hidden, device=self.device, dtype=dtype or self.dtype)
        x = F.layer_norm(x, (shape.hidden,)).requires_grad_(True)
        return x, torch.randn_like(x)


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]
