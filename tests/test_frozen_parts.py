"""Does what the user froze stay frozen, while PEFT's freezing of everything does not stop the updates?"""

from pathlib import Path

import pytest
import torch
from helpers.models import fill_updates, objective, opt, tokens
from helpers.training import TRAIN, Watch, factors, listening, patched_opt, trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_subquad import (
    InactivePatchError,
    apply_plan,
    calibrate,
    check_active,
    compensate,
    patch_model,
    sparse_mlps,
    sync_model,
)

LAYER, OTHER = "model.decoder.layers.1", "model.decoder.layers.2"
LORA = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return listening(monkeypatch, "training.callback")


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """Names of the MLPs whose factors moved."""
    moved = {name for name, value in factors(model).items() if not torch.equal(before[name], value)}
    return {name.rpartition(".fc")[0] for name in moved}


@pytest.mark.parametrize("when", ["before the patch", "after the patch"])
def test_a_frozen_layer_stays_frozen_and_sparse(when: str, tmp_path: Path, said: list[str]) -> None:
    model = opt()
    if when == "before the patch":
        model.get_submodule(LAYER).requires_grad_(False)
    patch_model(model, TRAIN)
    if when == "after the patch":
        model.get_submodule(LAYER).requires_grad_(False)
    before, weights = factors(model), {n: p.clone() for n, p in model.named_parameters() if n.startswith(LAYER)}
    trainer(model, tmp_path, max_steps=2).train()
    assert changed(before, model) == {OTHER}
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in weights.items())
    assert all(mlp.calls == 2 for mlp in sparse_mlps(model))
    assert [text for text in said if f"updates of 1 of 2 patched MLPs do not train ({LAYER}" in text]


def test_a_frozen_backbone_below_a_trained_head(tmp_path: Path) -> None:
    model = opt()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed_tokens" in name)  # tied to the head
    before = factors(patch_model(model, TRAIN))
    trainer(model, tmp_path, max_steps=2).train()
    assert not changed(before, model)
    assert all(mlp.calls == 2 for mlp in sparse_mlps(model))


def test_one_projection_frozen(tmp_path: Path) -> None:
    model = opt()
    model.get_parameter(f"{LAYER}.fc2.weight").requires_grad_(False)
    before = factors(patch_model(model, TRAIN))
    trainer(model, tmp_path, max_steps=2).train()
    moved = {name for name, value in factors(model).items() if not torch.equal(before[name], value)}
    assert moved == {name for name in before if not name.startswith(f"{LAYER}.fc2")}


@pytest.mark.parametrize("order", ["peft first", "patch first", "all frozen first", "all frozen last"])
def test_freezing_of_everything_is_told_apart(order: str, tmp_path: Path, said: list[str]) -> None:
    model = opt()
    if order == "all frozen first":
        model.requires_grad_(False)
    model = get_peft_model(model, LORA) if order == "peft first" else model
    model = patch_model(model, TRAIN)
    model = get_peft_model(model, LORA) if order == "patch first" else model
    if order == "all frozen last":
        model.requires_grad_(False)
    before = factors(model)
    trainer(model, tmp_path, max_steps=2).train()
    assert changed(before, model) == {LAYER, OTHER}
    assert not [text for text in said if "do not train" in text]


def test_frozen_before_the_patch_and_peft_after_it(tmp_path: Path) -> None:
    model = opt()
    model.get_submodule(LAYER).requires_grad_(False)
    model = get_peft_model(patch_model(model, TRAIN), LORA)
    before = factors(model)
    trainer(model, tmp_path, max_steps=2).train()
    assert changed(before, model) == {OTHER}


def test_forgotten_thaw_in_a_loop_of_ones_own() -> None:
    model = get_peft_model(patched_opt(), LORA)
    for check in (check_active, lambda model: sync_model(model, 0)):
        with pytest.raises(InactivePatchError, match=r"are frozen \(get_peft_model"):
            check(model)


@pytest.mark.parametrize("plans", [True, False])
def test_planning_and_fitting_thaw_what_peft_froze(plans: bool) -> None:
    """As the README's loop with `get_peft_model` after the patch."""
    model = get_peft_model(patched_opt(), LORA)
    batches = [{"input_ids": tokens(seed), "labels": tokens(seed)} for seed in range(2)]
    if plans:
        apply_plan(model, calibrate(model, batches))
    else:
        compensate(model, batches)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = factors(model)
    sync_model(model, 0, optimizer)
    model(**batches[0]).loss.backward()
    optimizer.step()
    assert changed(before, model) == {LAYER, OTHER}


@pytest.mark.parametrize("dense", [False, True])
def test_gradients_do_not_depend_on_which_updates_are_frozen(dense: bool) -> None:
    found = []
    for freeze in (False, True):
        model = patched_opt(active=1.0 if dense else 0.5)
        fill_updates(model)
        if freeze:
            model.get_submodule(LAYER).requires_grad_(False)
        objective(model(tokens()).logits).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert {name for name in found[0] if name not in found[1]} >= {f"{LAYER}.fc1.update.U", f"{LAYER}.fc2.update.V"}
    assert found[1] and all(torch.equal(value, found[0][name]) for name, value in found[1].items())


def test_layers_thawed_in_turns(tmp_path: Path) -> None:
    """As LISA does: other layers train after every few steps; base weights never do."""
    model = patched_opt(dense_share=0.5)
    turns: dict[int, set[str]] = {}
    before = factors(model)
    base = {name: p.clone() for name, p in model.named_parameters() if ".fc" in name and ".update." not in name}

    class Turns(Watch):
        def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
            for number, layer in enumerate((LAYER, OTHER)):
                model.get_submodule(layer).requires_grad_(state.global_step % 2 == number)

    def look(model: nn.Module, step: int, **_: object) -> None:
        nonlocal before
        turns[step], before = changed(before, model), factors(model)

    trainer(model, tmp_path, [Turns(look)], max_steps=4).train()
    assert turns == {1: {LAYER}, 2: {OTHER}, 3: {LAYER}, 4: {OTHER}}
    frozen_layers = (f"{LAYER}.", f"{OTHER}.")
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in base.items() if n.startswith(frozen_layers))


def test_parameter_groups_by_the_ends_of_names() -> None:
    model = patched_opt()
    groups = [p for name, p in model.named_parameters() if name.endswith(("weight", "bias")) and p.requires_grad]
    with pytest.raises(InactivePatchError, match=r"fc1\.update\.U.*parameter groups leave out names that end with"):
        check_active(model, torch.optim.SGD(groups, lr=0.1))
    sync_model(model, 0)
    check_active(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
