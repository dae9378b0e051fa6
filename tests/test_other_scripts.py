"""Does training go on where scripts do what they may: skip layers and batches, generate, or forget the callback?"""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import build, checkpoint_activations, fill_updates, objective, opt, tokens
from helpers.training import TRAIN, Texts, Watch, arguments, factors, listening, patched_opt, trainer
from torch import Tensor, nn
from transformers import Trainer

from hf_subquad import (
    SubquadCallback,
    SubquadConfig,
    dense_forward,
    patch_model,
    sparse_forward,
    sparse_mlps,
    sync_model,
)

# Steps that no patched MLP takes part in


class Skipping(Trainer):
    """Leaves out the batches of some steps, as guards against bad ones do."""

    skipped: tuple[int, ...] = ()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step in self.skipped:
            return torch.zeros(())
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("skipped", [(0,), (3,), (0, 1, 2, 3), (2, 3, 4, 5)], ids=str)
def test_skipped_batches(skipped: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = listening(monkeypatch, "training.sync_model", "warning")
    model = patched_opt(refresh_steps=2)
    run = Skipping(model=model, args=arguments(tmp_path, max_steps=6), train_dataset=Texts(),
                   callbacks=[SubquadCallback()])  # fmt: skip
    run.skipped = skipped
    run.train()
    assert run.state.global_step == 6
    assert all(mlp.calls == 6 - len(skipped) for mlp in sparse_mlps(model))
    assert not said


class Evaluating(Trainer):
    """Trains in evaluation mode, so that nothing is dropped."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        model.eval().train = lambda mode=True: model
        return super().training_step(model, *args, **kwargs)


@pytest.mark.parametrize(("kind", "steps"), [(Skipping, 4), (Skipping, 6), (Evaluating, 7)])
def test_no_patched_mlp_ever(kind: type[Trainer], steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is saved then, but nothing is wrong either."""
    said = listening(monkeypatch, "training.sync_model", "warning")
    run = kind(model=patched_opt(), args=arguments(tmp_path, max_steps=steps), train_dataset=Texts(),
               callbacks=[SubquadCallback()])  # fmt: skip
    run.skipped = tuple(range(steps))
    run.train()
    assert run.state.global_step == steps
    assert ["no patched MLP ran sparse in the first 5" in text for text in said] == [True] * (steps >= 5)


class SyncsToo(Watch):
    """Another callback that keeps the model in sync, more often than needed."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        for _ in range(3):
            sync_model(model, state.global_step)


def test_idle_steps_are_counted_once_each_and_in_a_trainer_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = listening(monkeypatch, "training.sync_model", "warning")
    model = patched_opt()
    run = Skipping(model=model, args=arguments(tmp_path, max_steps=4), train_dataset=Texts(),
                   callbacks=[SubquadCallback(), SyncsToo(lambda *_, **__: None)])  # fmt: skip
    run.skipped = tuple(range(4))
    run.train()
    for step in range(9):
        sync_model(model, step)
    assert run.state.global_step == 4 and not said


class OwnSearch(Trainer):
    """Its trials are not the Trainer's."""

    def _hp_search_setup(self, trial: Any) -> None:
        pass


def test_a_trainer_with_a_search_of_its_own(tmp_path: Path) -> None:
    run = OwnSearch(model=patched_opt(), args=arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1),
                    train_dataset=Texts(), callbacks=[SubquadCallback()])  # fmt: skip
    run.train()
    assert (tmp_path / "checkpoint-1" / "subquad_state.safetensors").is_file()


def test_hooks_that_make_mlps_dense_are_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = listening(monkeypatch, "training.sync_model", "warning")
    model = patched_opt()
    for mlp in sparse_mlps(model):
        for module in mlp.between:
            module.register_forward_hook(lambda *_: None)
    trainer(model, tmp_path, max_steps=7).train()
    assert not said


@pytest.mark.parametrize("family", ["opt", "bart"])
def test_dropped_layers(family: str, tmp_path: Path) -> None:
    """LayerDrop at a rate at which steps without any patched MLP are usual."""
    settings = {"opt": {"layerdrop": 0.6}, "bart": {"encoder_layerdrop": 0.7, "decoder_layerdrop": 0.7}}[family]
    model = patch_model(build(family, **settings), TRAIN)
    run = trainer(model, tmp_path, max_steps=16)
    run.train()
    assert run.state.global_step == 16
    assert 0 < sum(mlp.calls for mlp in sparse_mlps(model)) < 16 * len(sparse_mlps(model))


# Generation


def new_tokens(model: nn.Module, **settings: Any) -> Tensor:
    return model.generate(tokens(), max_new_tokens=5, do_sample=False, eos_token_id=None, **settings)


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rollouts_in_training_mode_are_dense(family: str, checkpointing: bool) -> None:
    model = patch_model(build(family), TRAIN)
    fill_updates(model)
    if checkpointing:
        checkpoint_activations(model, False)
    found = new_tokens(model.train())
    assert not any(mlp.calls for mlp in sparse_mlps(model))
    with torch.no_grad():
        scores = model(tokens()).logits
    expected = new_tokens(model.eval())
    assert checkpointing or torch.equal(found, expected)  # transformers drops the cache under checkpointing
    with torch.no_grad():
        torch.testing.assert_close(scores, model(tokens()).logits)
    model.train()(tokens()).logits.sum().backward()
    assert all(mlp.calls for mlp in sparse_mlps(model))


@pytest.mark.parametrize("ask", ["context", "setting"])
def test_sparse_rollouts_on_demand(ask: str) -> None:
    model = patched_opt(sparse_eval=ask == "setting")
    if ask == "context":
        with sparse_forward(model):
            new_tokens(model)
    else:
        new_tokens(model)
    assert all(mlp.calls for mlp in sparse_mlps(model))


# Loops of one's own


def test_a_forgotten_callback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = listening(monkeypatch, "layers.shared_state")
    Trainer(model=patched_opt(), args=arguments(tmp_path, max_steps=2), train_dataset=Texts()).train()
    assert said and "callbacks=[SubquadCallback()]" in said[0]
    said.clear()
    model = patched_opt()
    model.eval()(tokens())
    with dense_forward(model):
        model.train()(tokens())
    assert not said
    objective(model(tokens()).logits).backward()
    assert said


def test_nothing_is_said_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = listening(monkeypatch, "layers.shared_state")
    trainer(patched_opt(), tmp_path, max_steps=2).train()
    trainer(patch_model(opt(), SubquadConfig(rank=3, tile_size=5, sketch_rank=20)), tmp_path, max_steps=2).train()
    model = patched_opt()
    sync_model(model, 0)
    before = factors(model)
    objective(model(tokens()).logits).backward()
    assert before and not said
