"""One MLP three ways: dense and fully trained, dense and frozen with LoRA, and sparse."""

from typing import Any

import torch
import torch.nn.functional as F
from bench_layer import GatedMLP, LoRALinear, PlainMLP
from torch import Tensor, nn

from hf_subquad import SubquadConfig, patch_model, sparse_mlps
from hf_subquad.layers.sparse_mlp import SparseMLP

from .bench import Bench
from .shapes import Shape


def mlp(bench: Bench, shape: Shape, kind: str) -> nn.Module:
    """The same module at every call. Changes of its budget or its tiles stay."""
    return bench.once(f"{kind} {shape.name}", lambda: build(bench, shape, kind, bench.dtype))


def build(bench: Bench, shape: Shape, kind: str, dtype: torch.dtype, **settings: Any) -> nn.Module:
    """Random weights, made on the device; the LoRA and the sparse one have updates of the same rank.

    Args:
        settings: of `SubquadConfig`.
    """
    torch.manual_seed(0)
    with torch.device(bench.device):
        layer = (GatedMLP if shape.gated else PlainMLP)(shape.hidden, shape.intermediate).to(dtype)
        if kind == "lora":
            for name, child in list(layer.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(layer, name, LoRALinear(child, bench.sizes.rank))
    if kind == "subquad":  # draws from a generator on the CPU
        wanted = {"rank": bench.sizes.rank, "tile_size": bench.sizes.tile, "backend": "triton"}
        patch_model(layer, SubquadConfig(**(wanted | settings)))
    return layer.train()


def sparse(layer: nn.Module) -> SparseMLP:
    return sparse_mlps(layer)[0]


def tokens(bench: Bench, shape: Shape, count: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Normalised random tokens [N, d] that require a gradient, and the gradient of the MLP's output [N, d]."""
    x = torch.randn(count, shape.hidden, device=bench.device, dtype=dtype or bench.dtype)
    x = F.layer_norm(x, (shape.hidden,)).requires_grad_(True)
    return x, torch.randn_like(x)


def forward_backward(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    """Gradients of x and of all trainable parameters included; those of the last run are dropped first."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    layer(x).backward(grad)
