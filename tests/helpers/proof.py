"""Is a model the same model once it is patched? Sparse against a masked dense twin, saved, reloaded and unpatched."""

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from helpers.models import fill_updates
from helpers.reference import mask_of, plain_output, selections_by_mlp
from hf_subquad import SubquadConfig, dense_forward, patch_model, sparse_mlps, unpatch_model
from hf_subquad.layers.budget import Budget

CONFIG = SubquadConfig(rank=3, alpha=5.0, active=0.25, tile_size=8, sketch_rank=12, layers_to_transform="all")
_TOLERANCE = 1e-6  # of the largest value: both sides compute in float64, from updates in float32


class NotComparedError(Exception):
    """These inputs cannot show whether the patched model is right; the message says why."""


def prove(model: nn.Module, inputs: dict[str, Tensor]) -> list[str]:
    """Patch a model in float64, compare it with its plain twin in every way, and unpatch it.

    Returns:
        Names of the MLPs that the inputs went through.

    Raises:
        AssertionError: something differs.
        NotComparedError: the inputs reach no MLP, or the plain model is not finite on them.
        PatchError: the model was refused.
    """
    plain = copy.deepcopy(model)
    outputs, gradients = _result_of(plain, inputs)
    if not all(value.isfinite().all() for value in (*outputs, *gradients.values())):
        raise NotComparedError("its plain model has outputs or gradients that are not finite")
    patch_model(model, CONFIG)
    mlps = sparse_mlps(model)
    untrained = {name: value.clone() for name, value in model.named_parameters() if ".update." in name}
    fill_updates(model)

    with selections_by_mlp(model) as selections:
        sparse = _result_of(model, inputs)
    masks = [
        [mask_of(selection, mlp.index.neurons, torch.float64) for selection in made]
        for mlp, made in zip(mlps, selections, strict=True)
    ]
    reached = [mlp.name for mlp, made in zip(mlps, selections, strict=True) if made]
    if not reached:
        raise NotComparedError("the inputs go through none of the MLPs")
    _assert_close("sparse", sparse, _of_twin(plain, model, inputs, masks))
    dense = _of_twin(plain, model, inputs, None)
    if _difference(sparse[0], dense[0]) < 100 * _TOLERANCE:
        raise NotComparedError("its outputs do not show what the MLPs compute")

    for mlp in mlps:
        mlp.set_budget(Budget())  # all of them, through the code of parts
    _assert_close("all neurons", _result_of(model, inputs), dense)
    model.eval(), plain.eval()
    _prove_saving(model, inputs)

    with torch.no_grad():
        for name, value in untrained.items():
            model.get_parameter(name).copy_(value)
    unpatch_model(model)
    before, after = plain.state_dict(), model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items()), "unpatched weights differ"
    pairs = zip(_run(model, inputs), _run(plain, inputs), strict=True)
    assert all(torch.equal(got, expected) for got, expected in pairs), "unpatched outputs differ"
    return reached


def _prove_saving(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    with dense_forward(model):
        live = _run(model, inputs)
    saved = _run(_round_trip(model), inputs)
    if _difference(saved, live) > _TOLERANCE:  # some models are others after a round trip without a patch, too
        merged = unpatch_model(copy.deepcopy(model))
        assert _difference(_run(merged, inputs), live) <= _TOLERANCE, "the merged model is another one"
        assert _difference(saved, _run(_round_trip(merged), inputs)) <= _TOLERANCE, "the saved model is another one"


def _round_trip(model: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reloaded, report = type(model).from_pretrained(
            folder, dtype=torch.float64, experts_implementation="eager", output_loading_info=True
        )
    assert not any(report.values()), f"the checkpoint is not whole: {report}"
    return reloaded.double().eval()


Result = tuple[list[Tensor], dict[str, Tensor]]  # outputs, and gradients by parameter name


def _result(output: Any, parameters: dict[str, Tensor]) -> Result:
    outputs = _tensors(output)
    generator = torch.Generator().manual_seed(5)
    terms = [
        (value * torch.randn(value.shape, generator=generator, dtype=value.dtype)).sum()
        for value in outputs
        if value.requires_grad
    ]
    used = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    gradients = torch.autograd.grad(torch.stack(terms).sum(), list(used.values()), allow_unused=True)
    found = {name: gradient for name, gradient in zip(used, gradients, strict=True) if gradient is not None}
    return [value.detach() for value in outputs], found


def _result_of(model: nn.Module, inputs: dict[str, Tensor]) -> Result:
    torch.manual_seed(0)
    return _result(model(**inputs), dict(model.named_parameters()))


def _of_twin(plain: nn.Module, patched: nn.Module, inputs: dict[str, Tensor], masks: Any) -> Result:
    torch.manual_seed(0)
    output, leaves = plain_output(plain, patched, inputs, masks)
    trained = {name for name, parameter in patched.named_parameters() if parameter.requires_grad}
    parameters = {**dict(plain.named_parameters()), **leaves}
    return _result(output, {name: value for name, value in parameters.items() if name in trained})


def _assert_close(what: str, got: Result, expected: Result) -> None:
    assert _difference(got[0], expected[0]) <= _TOLERANCE, f"{what}: outputs differ"
    assert set(got[1]) == set(expected[1]), f"{what}: {sorted(set(got[1]) ^ set(expected[1]))[:3]} got a gradient once"
    pairs = [(got[1][name], expected[1][name]) for name in expected[1]]
    assert _difference(*zip(*pairs, strict=True)) <= _TOLERANCE, f"{what}: gradients differ"


def _difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference, as a share of the largest value of its tensor; of nearly nothing where that is noise."""
    pairs = [(a, b) for a, b in zip(got, expected, strict=True) if b.numel()]
    sizes = [b.abs().amax().item() for _, b in pairs]
    noise = 1e-6 * max(sizes)
    differences = [(a - b).abs().amax().item() for a, b in pairs]
    return max(difference / max(size, noise) for difference, size in zip(differences, sizes, strict=True))


@torch.no_grad()
def _run(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(0)  # of masks drawn in training
    return _tensors(model(**inputs))


def _tensors(output: Any) -> list[Tensor]:
    """All floating-point tensors in an output, but for caches."""
    leaves = pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]
