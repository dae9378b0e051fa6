"""The same computation done plainly: full weights, autograd, and a mask in front of every output projection.

Nothing of the library computes here; only its selections (tiles and neurons) are read.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_subquad import sparse_mlps
from hf_subquad.index.choose_neurons import ActivationIndex
from hf_subquad.ops.group_tokens import Selection


def mask_of(selection: Selection, neurons: int, dtype: torch.dtype) -> Tensor:
    """[N, m]: 1 where the selection computes neuron j for token i."""
    tiles = selection.tiles
    mask = torch.zeros(len(tiles.position), neurons, dtype=dtype)
    for token, slot in enumerate(tiles.position.tolist()):
        assert tiles.slots.flatten()[slot] == token
        mask[token, selection.neurons[slot // tiles.shape[1]]] = 1
    return mask


@contextmanager
def recorded_selections() -> Iterator[list[Selection]]:
    """Collects every selection that any index makes inside the block."""
    made: list[Selection] = []
    select = ActivationIndex.select

    def recording(self: ActivationIndex, *args: object, **kwargs: object) -> Selection:
        made.append(select(self, *args, **kwargs))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActivationIndex, "select", recording)
        yield made


@contextmanager
def selections_by_mlp(model: nn.Module) -> Iterator[list[list[Selection]]]:
    """Collects every selection that is made for each MLP of a model inside the block, in the order of its calls."""
    mlps = sparse_mlps(model)
    made: list[list[Selection]] = [[] for _ in mlps]

    def recording(select: Callable[..., Selection], own: list[Selection]) -> Callable[..., Selection]:
        def recorded(*args: object) -> Selection:
            own.append(select(*args))
            return own[-1]

        return recorded

    for mlp, own in zip(mlps, made, strict=True):
        mlp.index.select = recording(mlp.index.select, own)  # type: ignore[method-assign]
    try:
        yield made
    finally:
        for mlp in mlps:
            del mlp.index.select


def plain_logits(
    plain: nn.Module, patched: nn.Module, inputs: dict[str, Tensor], masks: list[Tensor] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """`plain_output`'s logits, with one mask per MLP."""
    output, leaves = plain_output(plain, patched, inputs, None if masks is None else [[mask] for mask in masks])
    return output.logits, leaves


def plain_output(
    plain: nn.Module, patched: nn.Module, inputs: dict[str, Tensor], masks: list[list[Tensor]] | None
) -> tuple[Any, dict[str, Tensor]]:
    """Output of the unpatched twin with weights W + s U V, and the leaf tensors U, V by parameter name.

    Args:
        plain: an unpatched model with the same base weights.
        masks: for each patched MLP one [N, m] per call, multiplied onto what its output projection gets; None: dense.
    """
    leaves: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    handles = []
    for number, mlp in enumerate(sparse_mlps(patched)):
        for path, projection in zip(mlp.sources, mlp.projections, strict=True):
            name = f"{mlp.name}.{path}"
            module = plain.get_submodule(name)
            u = projection.update.U.detach().clone().requires_grad_()
            v = projection.update.V.detach().clone().requires_grad_()
            leaves[f"{name}.update.U"], leaves[f"{name}.update.V"] = u, v
            by_neuron = (mlp.runtime.config.alpha / mlp.runtime.config.rank) * (u @ v)
            is_input = path != list(mlp.sources)[-1]
            rows_first = is_input != isinstance(module, Conv1D)
            update = by_neuron if rows_first else by_neuron.t()
            weights[f"{name}.weight"] = module.weight.detach() + update.to(module.weight.dtype)
        if masks is not None:
            handles.append(module.register_forward_pre_hook(_masking(iter(masks[number]))))
    try:
        output = torch.func.functional_call(plain, weights, (), inputs)
    finally:
        for handle in handles:
            handle.remove()
    return output, leaves


def _masking(masks: Iterator[Tensor]):
    def mask(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        runs_dense = module.training and not torch.is_grad_enabled()  # as a rollout does
        if runs_dense or not args[0].numel():
            return None
        return (args[0] * next(masks).view(*args[0].shape[:-1], -1).to(args[0].dtype),)

    return mask
