"""Does the custom loop work through accelerate: prepared, saved, loaded again and unwrapped?"""

import copy
import inspect
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from helpers.models import VOCABULARY, opt, tokens
from helpers.training import Texts, factors, patched_opt, steps_through_accelerate
from torch import nn

from hf_subquad import (
    check_active,
    dense_forward,
    load_sidecar,
    patch_head,
    save_sidecar,
    sparse_mlps,
    sync_model,
    unpatch_head,
)
from hf_subquad.head.patch_head import labelled_forward


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    assert not PartialState._shared_state


def prepared(precision: str = "no") -> tuple[Accelerator, nn.Module, torch.optim.Optimizer]:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = patched_opt(fold_steps=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    check_active(model, optimizer)
    return accelerator, model, optimizer


def train(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int
) -> list[float]:
    """Losses of the steps from first to last, each on a batch of its own."""
    batches = list(accelerator.prepare(torch.utils.data.DataLoader(Texts(), batch_size=2)))
    numbered = {step: batches[step] for step in range(first, last + 1)}
    return steps_through_accelerate(accelerator, model, optimizer, numbered)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_saved_and_loaded_state_goes_on_as_if_unbroken(precision: str, tmp_path: Path) -> None:
    accelerator, model, optimizer = prepared(precision)
    accelerator.register_save_state_pre_hook(
        lambda models, weights, folder: save_sidecar(accelerator.unwrap_model(models[0]), folder, step=3)
    )
    before = factors(model)
    sync_model(model, 0)
    train(accelerator, model, optimizer, 1, 3)
    assert all(not torch.equal(value, factors(model)[name]) for name, value in before.items())
    accelerator.save_state(str(tmp_path / "state"))
    expected = train(accelerator, model, optimizer, 4, 6)

    accelerator, model, optimizer = prepared(precision)
    accelerator.load_state(str(tmp_path / "state"))
    sync_model(model, load_sidecar(model, tmp_path / "state"))
    assert train(accelerator, model, optimizer, 4, 6) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("way", ["save_pretrained", "save_model", "get_state_dict"])
def test_what_is_saved_is_plain(way: str, tmp_path: Path) -> None:
    accelerator, model, optimizer = prepared()
    train(accelerator, model, optimizer, 1, 3)
    bare = accelerator.unwrap_model(model)
    assert type(bare) is type(opt()) and sparse_mlps(bare)
    plain = opt()
    if way == "get_state_dict":
        plain.load_state_dict(accelerator.get_state_dict(model))
    elif way == "save_model":
        opt().config.save_pretrained(tmp_path)
        accelerator.save_model(model, str(tmp_path))
        plain = type(plain).from_pretrained(tmp_path)
    else:
        bare.save_pretrained(tmp_path, save_function=accelerator.save)
        plain = type(plain).from_pretrained(tmp_path)
    with dense_forward(model):
        torch.testing.assert_close(plain.eval()(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("undone", [None, False, True])
def test_a_patched_head_in_mixed_precision(undone: bool | None) -> None:
    """Accelerate wraps its forward, and makes a method of it where the wrapping is undone. A copy is a model by itself,
    and the head can be restored and patched again, before and after that."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(patch_head(opt()))
    if undone is not None:
        model = accelerator.unwrap_model(model, keep_fp32_wrapper=not undone)
    if undone:
        assert list(inspect.signature(model.forward).parameters) == list(inspect.signature(opt().forward).parameters)
    batch = {"input_ids": tokens(), "labels": tokens()}
    losses = []
    for again in (False, True):
        assert labelled_forward(model) is not None
        found = model.train()(tokens(), labels=tokens())
        assert found.logits is None
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert other(**batch).logits is None and other(**batch).loss.item() == pytest.approx(math.log(VOCABULARY), 1e-3)
        losses.append(model(**batch).loss)
        unpatch_head(model)
        assert labelled_forward(model) is None and model(**batch).logits is not None
        if not again:
            patch_head(model)
    torch.testing.assert_close(losses, [found.loss] * 2)  # in the same precision


def test_optimizer_that_knows_nothing_of_the_updates() -> None:
    model = patched_opt()
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if ".update." not in n], lr=1e-2)
    model, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
    with pytest.raises(RuntimeError, match="does not hold 4 of the low-rank updates"):
        check_active(model, optimizer)
