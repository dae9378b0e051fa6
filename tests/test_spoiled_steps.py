"""Does a bad step stay what it is in any model: its own, passed on to the loss, and gone after `zero_grad`?"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import opt, tokens
from helpers.planning import hand_plan
from helpers.training import TRAIN, Watch, factors, losses, patched_opt, trainer
from torch import Tensor, nn

from hf_subquad import (
    OutputError,
    SubquadConfig,
    WeightsError,
    apply_plan,
    dense_forward,
    patch_model,
    sparse_mlps,
    sync_model,
)

EMBEDDINGS = "model.decoder.embed_tokens.weight"


class Loop:
    """Training by hand on token batches, each scaled by a factor in its embeddings; steps that are spoiled are left
    out, as a gradient scaler leaves them out."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.step = model, 0
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        sync_model(model, 0)

    def forward(self, seed: int, factor: float = 1.0) -> Tensor:
        embedded = self.model.get_parameter(EMBEDDINGS)[tokens(seed)].detach()
        embedded[1, 2] *= factor
        return self.model(inputs_embeds=embedded, labels=tokens(seed)).loss

    def run(self, seed: int, factor: float = 1.0) -> float:
        loss = self.forward(seed, factor)
        loss.backward()
        if loss.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        sync_model(self.model, self.step, self.optimizer)
        return loss.item()


def planned_opt(**values: Any) -> nn.Module:
    model = patch_model(opt(), SubquadConfig(**{**TRAIN.to_dict(), "active": None, **values}))
    apply_plan(model, hand_plan(model, [24, 24], error=0.8))
    return model


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf], ids=str)
def test_a_spoiled_batch_is_passed_on_and_leaves_nothing(factor: float) -> None:
    """With folds and audits at every step: the rest of the run is, to the bit, the run in which that step was dense
    and left out."""
    spoiled, spared = (Loop(planned_opt(fold_steps=2)) for _ in range(2))
    with dense_forward(spared.model):
        assert math.isnan(spared.forward(9, factor).item())
    for seed in range(6):
        if seed == 3:
            assert math.isnan(spoiled.run(9, factor))
            spared.step += 1
            for mlp in sparse_mlps(spared.model):
                mlp.audited = {}
            sync_model(spared.model, spared.step, spared.optimizer)
        else:
            assert spoiled.run(seed) == spared.run(seed)
    expected = factors(spared.model)
    assert all(torch.equal(value, expected[name]) for name, value in factors(spoiled.model).items())
    for mine, theirs in zip(sparse_mlps(spoiled.model), sparse_mlps(spared.model), strict=True):
        assert torch.equal(mine.index.sketch.codes, theirs.index.sketch.codes)
        assert mine.budget == theirs.budget


@pytest.mark.parametrize("factor", [1e10, 1e19, 1e30])
def test_a_spike_is_passed_on_and_leaves_nothing(factor: float) -> None:
    loop = Loop(planned_opt())
    before = loop.run(0)
    for mlp in sparse_mlps(loop.model):
        handle = mlp.inputs[0].register_forward_pre_hook(lambda module, args: (args[0] * factor,))
        loss = loop.forward(1)
        loss.backward()
        handle.remove()
        loop.optimizer.zero_grad()
        assert not math.isnan(loss.item()) or factor > 1e18
    assert loop.run(0) < before
    assert not any(mlp.dense for mlp in sparse_mlps(loop.model))


def test_a_gradient_scaler_skips_what_overflows_and_goes_on() -> None:
    """In float16, where a loss scaled by 2^24 overflows: the scaler halves until it does not."""
    model = patch_model(opt(), TRAIN)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    start, found = factors(model), []
    for step in range(30):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(tokens(step % 3), labels=tokens(step % 3)).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        sync_model(model, step + 1, optimizer)
        found.append(loss.item())
        if step == 0:
            assert all(torch.equal(value, start[name]) for name, value in factors(model).items())
    assert scaler.get_scale() < 2.0**24
    assert found[-1] < found[0] - 0.2
    assert all(value.isfinite().all() for value in factors(model).values())


def test_a_trainer_filters_the_loss_of_a_spoiled_step_as_ever(tmp_path: Path) -> None:
    """Its gradients are dropped before the optimizer sees them, as a scaler does."""

    class Spoil(Watch):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            mlp = sparse_mlps(model)[1]
            if state.global_step == 2:
                self.handle = mlp.inputs[0].register_forward_pre_hook(lambda module, args: (args[0] * math.nan,))

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 2:
                self.handle.remove()
                for parameter in model.parameters():
                    parameter.grad = None

    run = trainer(patched_opt(), tmp_path, [Spoil(lambda *_, **__: None)], max_steps=12)
    run.train()
    found = losses(run)
    assert len(found) == 12 and all(map(math.isfinite, found))  # `logging_nan_inf_filter` is on
    assert found[-1] < found[0]
    rows = [row for row in run.state.log_history if "subquad/output_error" in row]
    assert all(math.isfinite(row["subquad/output_error"]) for row in rows)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_updates_that_diverged_are_not_folded(value: float) -> None:
    """Not of any MLP, and the fold is due again once the updates are mended."""
    model = patched_opt(fold_steps=2)
    projection = sparse_mlps(model)[1].inputs[0]
    good = factors(model)
    with torch.no_grad():
        projection.update.U[3, 1] = value
    before = {name: value.clone() for name, value in model.named_parameters()}
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"layers\.2\.fc1.*step 4.*diverged"):
            sync_model(model, 4)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert not any(p.update.restarts for mlp in sparse_mlps(model) for p in mlp.projections)
    with torch.no_grad():
        projection.update.U.copy_(good["model.decoder.layers.2.fc1.U"])
        projection.update.V.copy_(good["model.decoder.layers.2.fc1.V"])
    assert sync_model(model, 4).folded


def test_nothing_is_folded_if_one_sum_overflows() -> None:
    model = patch_model(opt(torch.float16), replace(TRAIN, fold_steps=2))
    projection = sparse_mlps(model)[1].output
    with torch.no_grad():
        projection.update.U.fill_(300)
        projection.update.V.fill_(300)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(WeightsError, match="with its low-rank update"):
        sync_model(model, 4)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_a_huge_learning_rate_ends_in_an_error_that_says_so(tmp_path: Path) -> None:
    model = patched_opt(fold_steps=3)
    base = {n: p.clone() for n, p in model.named_parameters() if n.endswith(("fc1.weight", "fc2.weight"))}
    run = trainer(model, tmp_path, max_steps=12, learning_rate=1e25, max_grad_norm=0.0)
    with pytest.raises(WeightsError, match="lower learning rate"):
        run.train()
    patched = [f"{mlp.name}.{path}.weight" for mlp in sparse_mlps(model) for path in mlp.sources]
    assert len(patched) == 4 and all(torch.equal(model.get_parameter(name), base[name]) for name in patched)


def test_an_empty_batch_in_the_middle_of_training(tmp_path: Path) -> None:
    loop = Loop(planned_opt())
    loop.run(0)
    kept = [mlp.audited for mlp in sparse_mlps(loop.model)]
    assert sparse_mlps(loop.model)[0].inputs[0](torch.zeros(0, 20)).shape == (0, 52)
    assert [mlp.audited for mlp in sparse_mlps(loop.model)] == kept
    assert loop.run(0) > loop.run(0)


# Disks that fill up


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_disk_that_fills_up_at_a_checkpoint_spoils_no_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}

    def at_step_4(model: nn.Module, step: int, **_: Any) -> None:
        if step == 4:
            monkeypatch.setattr("os.fsync", full)

    run = trainer(patched_opt(), tmp_path, [Watch(at_step_4)], **saving)
    with pytest.raises(OutputError, match=r"checkpoint-4.subquad_state.*No space left"):
        run.train()
    monkeypatch.undo()
    assert not list(tmp_path.rglob(".subquad*"))
    again = trainer(patched_opt(), tmp_path, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 6
    whole = trainer(patched_opt(), tmp_path / "whole", max_steps=6)
    whole.train()
    assert losses(again) == pytest.approx(losses(whole), abs=1e-4)


def test_a_disk_that_is_full_at_the_start_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = planned_opt()
    before = factors(model)
    monkeypatch.setattr("os.replace", full)
    run = trainer(model, tmp_path)
    with pytest.raises(OutputError, match=r"subquad_plan\.json.*No space left"):
        run.train()
    assert run.state.global_step == 0
    assert all(torch.equal(before[name], value) for name, value in factors(model).items())
    assert not list(tmp_path.iterdir())
