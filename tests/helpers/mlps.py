"""One MLP by itself, patched, with a selection of our choice, and its masked dense twin written out by hand."""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_subquad import SubquadConfig, patch_model, sparse_mlps
from hf_subquad.layers.sparse_mlp import SparseMLP
from hf_subquad.ops.group_tokens import Selection, make_tiles
from hf_subquad.ops.mlp_products import Part

Kind = Literal["plain", "gated", "stacked", "conv1d"]
KINDS: tuple[Kind, ...] = ("plain", "gated", "stacked", "conv1d")


class Plain(nn.Module):
    def __init__(self, d: int, m: int, bias: bool, conv: bool = False) -> None:
        super().__init__()
        if conv:
            self.fc1, self.fc2 = Conv1D(m, d), Conv1D(d, m)
        else:
            self.fc1, self.fc2 = nn.Linear(d, m, bias), nn.Linear(m, d, bias)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Gated(nn.Module):
    def __init__(self, d: int, m: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(d, m, bias), nn.Linear(d, m, bias)
        self.down_proj, self.act_fn = nn.Linear(m, d, bias), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Stacked(nn.Module):
    def __init__(self, d: int, m: int, bias: bool) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(d, 2 * m, bias), nn.Linear(m, d, bias)
        self.activation_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


_ACTIVATIONS = {Plain: "act", Gated: "act_fn", Stacked: "activation_fn"}


def single(
    kind: Kind,
    d: int,
    m: int,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    activation: nn.Module | None = None,
) -> nn.Module:
    """An unpatched MLP with weights of size about 1 / sqrt(fan in) and biases of size 0.3; by default with GELU, or
    SiLU if gated."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        mlp = {"gated": Gated, "stacked": Stacked}.get(kind, Plain)(
            d, m, bias, **({"conv": True} if kind == "conv1d" else {})
        )
        for parameter in mlp.parameters():
            nn.init.normal_(
                parameter, std=0.3 if parameter.dim() == 1 else (d if parameter.shape[-1] == d else m) ** -0.5
            )
    if activation is not None:
        setattr(mlp, _ACTIVATIONS[type(mlp)], activation)
    return mlp.to(dtype)


def patched(
    kind: Kind,
    d: int,
    m: int,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    activation: nn.Module | None = None,
    **settings: object,
):
    """(patched module, its SparseMLP, an unpatched copy); the updates hold random values."""
    module = single(kind, d, m, bias, dtype, activation)
    twin = copy.deepcopy(module)
    settings = {"rank": 2, "alpha": 3.0, "sketch_rank": d, "layers_to_transform": "all", **settings}
    patch_model(module, SubquadConfig(**settings))
    mlp = sparse_mlps(module)[0]
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for projection in mlp.projections:
            for factor in projection.update.parameters():
                factor.copy_(0.4 * torch.randn(factor.shape, generator=generator))
    return module.train(), mlp, twin


def force(mlp: SparseMLP, tokens: int, k: int, tile_size: int) -> Selection:
    """Tiles of random content and k random neurons each, whatever the input."""
    generator = torch.Generator().manual_seed(13)
    tiles = make_tiles(torch.randn(tokens, 6, generator=generator), tile_size, "similar")
    m = mlp.index.neurons
    chosen = [torch.randperm(m, generator=generator)[:k].sort().values for _ in range(tiles.shape[0])]
    selection = Selection(tiles, torch.stack(chosen))
    mlp.selection_override = [Part(None, tokens, selection)]
    return selection


def reference(
    twin: nn.Module,
    mlp: SparseMLP,
    x: Tensor,
    mask: Tensor | None,
    leaves: list[tuple[Tensor, Tensor]],
    passing: Tensor | None = None,
) -> Tensor:
    """The MLP with stock operations in the dtype of x: a dense base and a LoRA-like branch beside it, then the mask.

    Args:
        mask: [N, m], the neurons that count for each token; None: all.
        passing: [N], what each token's output gradient is multiplied by before it enters the activations; None: 1.
    """
    scale = mlp.runtime.config.alpha / mlp.runtime.config.rank
    sources = list(mlp.sources)

    def linear(path: str, values: Tensor, u: Tensor, v: Tensor, into: bool) -> Tensor:
        module = twin.get_submodule(path)
        weight = (module.weight.t() if isinstance(module, Conv1D) else module.weight).to(values.dtype)
        bias = None if module.bias is None else module.bias.to(values.dtype)
        u, v = u.to(values.dtype), (scale * v).to(values.dtype)
        low = values @ v.t() @ u.t() if into else values @ u @ v
        return F.linear(values, weight, bias) + low

    activation = getattr(twin, _ACTIVATIONS[type(twin)])
    pre = [linear(path, x, *leaves[i], into=True) for i, path in enumerate(sources[:-1])]
    if len(pre) == 2:
        hidden = activation(pre[0]) * pre[1]
    elif isinstance(twin, Stacked):
        gate, up = pre[0].chunk(2, dim=-1)
        hidden = activation(gate) * up
    else:
        hidden = activation(pre[0])
    if mask is not None:
        hidden = hidden * mask.to(hidden.dtype)
    if passing is not None:
        hidden.register_hook(lambda gradient: gradient * passing.unsqueeze(1).to(gradient.dtype))
    return linear(sources[-1], hidden, *leaves[-1], into=False)


def leaves_of(mlp: SparseMLP, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Copies of every U, V that take gradients."""
    return [
        tuple(factor.detach().to(dtype).clone().requires_grad_() for factor in (p.update.U, p.update.V))
        for p in mlp.projections
    ]
