"""Do state dicts of a patched model behave as any model's: written to, swapped out and in, averaged?"""

import copy
import gc
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.models import CONFIG, build, fill_updates, opt, tokens, trained
from helpers.training import Watch, factors, losses, patched_opt, trainer
from torch import Tensor, nn

from hf_subquad import dense_forward, patch_model, sparse_mlps, sync_model

FAMILIES = ("opt", "llama", "gpt2", "phi3")


def logits(model: nn.Module) -> Tensor:
    with dense_forward(model), torch.no_grad():
        return model(tokens()).logits


# Writing into what `state_dict()` returns

WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "copy_": lambda e, v: e.copy_(v),
    "average": lambda e, v: e.mul_(0.25).add_(v, alpha=0.75),
    "around the version counter": lambda e, v: e.data.copy_(v),
}


@pytest.mark.parametrize(
    ("write", "family", "average_of"),
    [
        *((write, "opt", "trained") for write in WRITES),
        *((write, family, "trained") for write, family in zip(WRITES, FAMILIES[1:], strict=True)),
        ("copy_", "gpt2", "fresh"),
        ("average", "llama", "fresh"),
    ],
)
def test_averages_written_into_a_state_dict_reach_the_model(write: str, family: str, average_of: str) -> None:
    model = trained(family, seed=5)
    average = trained(family) if average_of == "trained" else patch_model(build(family), CONFIG)
    plain = build(family)
    plain.load_state_dict(average.state_dict())
    for e, v in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if e.is_floating_point():
            WRITES[write](e, v)
    for e, v in zip(plain.state_dict().values(), model.state_dict().values(), strict=True):
        if e.is_floating_point():
            WRITES[write](e, v)
    torch.testing.assert_close(logits(average), plain(tokens()).logits.detach(), rtol=1e-4, atol=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(average.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_writes_are_seen_while_the_state_is_in_use() -> None:
    model = trained()
    state = model.state_dict()
    before = logits(model)
    name = "model.decoder.layers.1.fc2.weight"
    state[name].mul_(1.5)
    expected = build("opt")
    expected.load_state_dict(state)
    torch.testing.assert_close(logits(model), expected(tokens()).logits.detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    model.train()(tokens()).logits.sum().backward()


def test_reading_changes_nothing_and_keeps_nothing() -> None:
    model = trained()
    before = factors(model)
    state = model.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert {type(value) for value in torch.load(buffer, weights_only=True).values()} == {Tensor}
    alive = [value for value in state.values() if value.data_ptr() not in {p.data_ptr() for p in model.parameters()}]
    pointers = {value.data_ptr() for value in alive}
    assert pointers
    del state, alive
    gc.collect()
    plain = [thing for thing in gc.get_objects() if type(thing) is Tensor]  # others may have no storage
    held = [tensor for tensor in plain if tensor.shape == (20, 52) and tensor.data_ptr() in pointers]
    assert not held
    assert all(torch.equal(value, before[name]) for name, value in factors(model).items())


# Swapping weights out and in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_model_comes_back(family: str, assign: bool, dtype: torch.dtype) -> None:
    model, other = trained(family, dtype), build(family, dtype)
    before, weights = factors(model), {n: p.clone() for n, p in model.named_parameters() if ".update." not in n}
    kept = copy.deepcopy(model.state_dict())
    exact = {name: value.clone() for name, value in kept.items()}
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    model.load_state_dict(other.state_dict(), assign=assign)
    torch.testing.assert_close(logits(model), other(tokens()).logits.detach(), rtol=1e-4, atol=1e-4)
    assert all(p.update.is_zero() for mlp in sparse_mlps(model) for p in mlp.projections)
    model.load_state_dict(kept, assign=assign)
    assert all(torch.equal(value, before[name]) for name, value in factors(model).items())
    eps = torch.finfo(dtype).eps
    for name, value in weights.items():  # W + UV - UV, rounded at the size of what is subtracted
        torch.testing.assert_close(model.get_parameter(name), value, rtol=eps, atol=4 * eps)
    assert all(torch.equal(value, exact[name]) for name, value in kept.items())  # what was assigned is not written to


def test_training_goes_on_after_a_swap(tmp_path: Path) -> None:
    """As evaluating an average in the middle of training does it."""
    found = []
    for swaps in (False, True):

        def swap(model: nn.Module, step: int, optimizer: object = None, swaps: bool = swaps, **_: object) -> None:
            if swaps and step % 2 == 0:
                kept = copy.deepcopy(model.state_dict())
                model.load_state_dict(opt().state_dict())
                logits(model)
                model.load_state_dict(kept)

        run = trainer(patched_opt(), tmp_path, [Watch(swap)], max_steps=8)
        run.train()
        found.append(losses(run))
    assert found[1] == pytest.approx(found[0], abs=1e-4)


def test_the_best_of_several_states() -> None:
    model = trained()
    states = []
    for seed in range(3):
        fill_updates(model, seed)
        states.append((factors(model), copy.deepcopy(model.state_dict()), logits(model)))
    for before, state, expected in states:
        model.load_state_dict(state)
        assert all(torch.equal(value, before[name]) for name, value in factors(model).items())
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_moments_restart_with_weights_from_elsewhere() -> None:
    model = patched_opt()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    update = sparse_mlps(model)[0].inputs[0].update
    sync_model(model, 0)
    kept = []
    for state in (None, opt().state_dict()):
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        if state:
            model.load_state_dict(state)
        sync_model(model, 1 + bool(state), optimizer)
        kept.append(update.U in optimizer.state)
    assert kept == [True, False]


def test_a_state_that_was_overwritten_can_be_loaded() -> None:
    """As torch.distributed.checkpoint reads a checkpoint: into a state dict of the model, which it then loads."""
    model = trained("opt")
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    with dense_forward(model):
        expected = model(tokens()).logits.detach()
    with torch.no_grad():
        for projection in sparse_mlps(model)[0].projections:
            projection.update.U.add_(0.1)
            projection.update.V.add_(0.1)
    state = model.state_dict()
    for name, value in state.items():
        value.copy_(saved[name])
    model.load_state_dict(state, strict=False)
    with dense_forward(model):
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_state_made_in_inference_mode() -> None:
    model = trained("opt")
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        state = model.state_dict()
    for name, value in expected.items():
        assert torch.equal(state[name], value)
