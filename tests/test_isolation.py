"""Same seed, same run; and nothing outside the patched model changes: randomness, classes, other models."""

import inspect
import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import CONFIG, FAMILIES, batch, build, fill_updates, logits, opt, tokens
from helpers.reference import recorded_selections
from helpers.training import factors
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_subquad import SubquadConfig, dense_forward, patch_model, sparse_mlps, sync_model, unpatch_model


def trained(**values: Any) -> tuple[nn.Module, list[Tensor]]:
    model = patch_model(opt(), SubquadConfig(**{**CONFIG.to_dict(), "fold_steps": 2, "refresh_steps": 2, **values}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    chosen = []
    sync_model(model, 0)
    for step in range(1, 5):
        with recorded_selections() as selections:
            model(tokens(step), labels=tokens(step)).loss.backward()
        chosen += [s.neurons for s in selections] + [s.tiles.slots for s in selections]
        optimizer.step()
        optimizer.zero_grad()
        sync_model(model, step, optimizer)
    return model, chosen


def test_same_seed_same_run() -> None:
    torch.manual_seed(1)
    first, chosen = trained()
    torch.manual_seed(2)  # the global seed has no say
    torch.randn(5)
    second, chosen_again = trained()
    assert len(chosen) >= 16
    assert all(torch.equal(a, b) for a, b in zip(chosen, chosen_again, strict=True))
    for name, value in first.named_parameters():
        assert torch.equal(value, second.get_parameter(name)), name


def test_another_seed_is_another_run() -> None:
    first, second = factors(trained(fold_steps=3)[0]), factors(trained(fold_steps=3, seed=1)[0])
    assert len(first) == 8
    assert all(not torch.equal(value, second[name]) for name, value in first.items())


def test_projections_start_differently_and_independently_of_what_else_is_patched() -> None:
    every = SubquadConfig(**{**CONFIG.to_dict(), "layers_to_transform": "all"})
    all_layers, some = factors(patch_model(opt(), every)), factors(patch_model(opt(), CONFIG))
    drawn = {name: value for name, value in all_layers.items() if value.any()}
    assert len(drawn) == 6
    for side in (".V", ".U"):
        values = [value for name, value in drawn.items() if name.endswith(side)]
        assert len(values) == 3
        assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    assert len(some) == 8 and all(torch.equal(value, all_layers[name]) for name, value in some.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_global_randomness_is_untouched(family: str) -> None:
    model = build(family)
    inputs = batch(family, model)
    untouched = torch.get_rng_state()
    logits(model, inputs)  # some draw numbers themselves, whether for a layer drop of zero or more
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    torch.set_rng_state(untouched)
    patch_model(model, CONFIG)
    logits(model, inputs)
    fill_updates(model)
    for mlp in sparse_mlps(model):
        mlp.index.fold()
    unpatch_model(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_two_patches_share_nothing() -> None:
    first = patch_model(opt(), CONFIG)
    second = patch_model(opt(), SubquadConfig(**{**CONFIG.to_dict(), "sparse_eval": True, "active": 9}))
    runtimes = [sparse_mlps(model)[0].runtime for model in (first, second)]
    assert runtimes[0] is not runtimes[1]
    before = second(tokens()).logits
    fill_updates(first)
    first(tokens()).logits.sum().backward()
    sync_model(first, 100)
    with dense_forward(first):
        assert torch.equal(second(tokens()).logits, before)
    assert runtimes[1].last_report is None and runtimes[1].forward == "auto"
    assert all(p.update.U.grad is None for mlp in sparse_mlps(second) for p in mlp.projections)
    unpatch_model(first)
    assert torch.equal(second(tokens()).logits, before)
    assert [mlp.k for mlp in sparse_mlps(second)] == [9, 9]


def classes() -> list[type]:
    model = opt()
    return [*{type(module) for module in model.modules()}, nn.Linear, nn.Module, Conv1D, torch.optim.AdamW]


def attributes(kinds: list[type]) -> list[tuple[str, str, int]]:
    return [(kind.__name__, name, id(value)) for kind in kinds for name, value in vars(kind).items()]


def test_library_classes_and_other_models_are_untouched() -> None:
    kinds = classes()
    before = attributes(kinds)
    other = opt().eval()
    expected, modules = other(tokens()).logits, [type(module) for module in other.modules()]
    source = inspect.getsource(type(other.model.decoder.layers[1]).forward)
    model = patch_model(opt(), CONFIG)
    model(tokens()).logits.sum().backward()
    assert attributes(kinds) == before
    assert [type(module) for module in other.modules()] == modules
    assert torch.equal(other(tokens()).logits, expected)
    assert inspect.getsource(type(model.model.decoder.layers[1]).forward) == source
    assert type(model) is type(other)


def test_parts_patched_one_by_one() -> None:
    """No half-way: either both follow, or an error says to patch the whole."""
    model = build("bart")
    patch_model(model.model.encoder, CONFIG)
    patch_model(model.model.decoder, CONFIG)
    with dense_forward(model):
        model(input_ids=tokens(), decoder_input_ids=tokens())
    assert not any(mlp.calls for mlp in sparse_mlps(model))
    model(input_ids=tokens(), decoder_input_ids=tokens())
    assert all(mlp.calls == 1 for mlp in sparse_mlps(model))
    with pytest.raises(ValueError, match="patched in 2 parts"):
        sync_model(model, 0)
