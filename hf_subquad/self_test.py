"""Proof, at patch time, that compacting an MLP leaves its mathematics alone."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedModuleError
from .index import Selection
from .layers import Forward, SparseMLP
from .tiling import make_tiles

_BATCH, _TOKENS = 2, 9


@torch.no_grad()
def self_test(mlp: SparseMLP) -> None:
    """Run an MLP compact and dense-but-masked on the same neurons, different ones per tile; they must agree.

    Half of the neurons are left out, so that anything between the projections that mixes neurons (a norm over them,
    a top-k among them) shows. The activation that scores neurons is compared with what the model computed.

    Raises:
        UnsupportedModuleError: the results differ, or the module that calls the projections cannot be run by itself.
    """
    weight = mlp.inputs[0].weight
    generator = torch.Generator().manual_seed(0)
    rows = mlp.inputs[0].rows()
    x = torch.randn(_BATCH, _TOKENS, rows.shape[1], generator=generator).to(weight)
    tiles = make_tiles(x.view(-1, x.shape[-1]), _TOKENS, "consecutive")
    half = -(-mlp.index.neurons // 2)
    chosen = [torch.randperm(mlp.index.neurons, generator=generator)[:half].sort().values for _ in range(_BATCH)]
    selection = Selection(tiles, torch.stack(chosen).to(weight.device))
    mask = torch.zeros(_BATCH, mlp.index.neurons, device=weight.device, dtype=weight.dtype)
    mask = mask.scatter_(1, selection.neurons, 1).repeat_interleave(_TOKENS, 0)

    def keep_chosen(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * mask.view(*args[0].shape[:-1], -1), *args[1:])

    with _evaluating(mlp.parent):
        with _forward(mlp, "dense", None), _pre_hook(mlp.output, keep_chosen):
            expected = _run(mlp, x)
        seen: dict[str, Tensor] = {}
        with (
            _forward(mlp, "sparse", selection),
            _pre_hook(mlp.inputs[0], lambda module, args: seen.update(x=args[0])),
            _pre_hook(mlp.output, lambda module, args: seen.update(a=args[0])),
        ):
            got = _run(mlp, x)
    _compare(mlp, got, expected, "it is not elementwise between its projections")
    exact = mlp.index.exact_activations(seen["x"].reshape(_BATCH * _TOKENS, -1)).view(_BATCH, _TOKENS, -1)
    expected = exact.gather(2, selection.neurons.unsqueeze(1).expand(-1, _TOKENS, -1))
    _compare(
        mlp,
        seen["a"],
        expected,
        f"its activation is not the {mlp.index.activation} found beside the projections",
    )


def _run(mlp: SparseMLP, x: Tensor) -> Tensor:
    parameters = list(inspect.signature(mlp.parent.forward).parameters.values())[1:]
    required = {p.name: None for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    try:
        output = mlp.parent(x, **required)
    except Exception as error:
        raise UnsupportedModuleError(
            f"{mlp.name} ({type(mlp.parent).__name__}) cannot be made sparse: running it on random input failed with "
            f"{type(error).__name__}: {error}"
        ) from error
    return output if isinstance(output, Tensor) else output[0]


def _compare(mlp: SparseMLP, got: Tensor, expected: Tensor, otherwise: str) -> None:
    got, expected = got.float(), expected.float()
    eps = max(torch.finfo(projection.weight.dtype).eps for projection in mlp.projections)
    tolerance = max(1e-4, 4 * eps) * expected.abs().amax().item()
    if got.shape != expected.shape or not (got - expected).abs().amax().item() <= tolerance:
        raise UnsupportedModuleError(
            f"{mlp.name} ({type(mlp.parent).__name__}) cannot be made sparse: {otherwise}. "
            "Leave it out with target_modules or layers_to_transform"
        )


@contextmanager
def _forward(mlp: SparseMLP, forward: Forward, forced: Selection | None) -> Iterator[None]:
    before = mlp.runtime.forward, mlp.forced, mlp.calls
    mlp.runtime.forward, mlp.forced = forward, forced
    try:
        yield
    finally:
        mlp.runtime.forward, mlp.forced, mlp.calls = before


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


@contextmanager
def _pre_hook(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
