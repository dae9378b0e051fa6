"""Does training resumed from a checkpoint equal training that was never interrupted?

Tolerances: a plain checkpoint holds W + s U V, and the base comes back as that minus s U V, off by one rounding of W
(6e-8 of its size in float32). Six Adam steps at 1e-2 carry that to below 1e-4 of the factors, which are about 0.1 in
size; Adam divides by the root of tiny second moments, so single entries with hardly a gradient move most.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import opt, tokens
from helpers.training import TRAIN, AtStart, StopAt, Texts, Watch, arguments, factors, losses, patched_opt, trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer

from hf_subquad import SidecarError, SubquadCallback, SubquadConfig, dense_forward, patch_model, sparse_mlps

SIDECAR = "subquad_state.safetensors"
LORA = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}


def plain(**values: Any) -> nn.Module:
    return patched_opt(**values)


def beside_peft(**values: Any) -> nn.Module:
    torch.manual_seed(3)  # of LoRA's A
    return get_peft_model(patch_model(opt(), SubquadConfig(**{**TRAIN.to_dict(), **values})), LORA)


def all_values(model: nn.Module) -> dict[str, Tensor]:
    values = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return {**values, **{n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("fc1.weight")}}


@pytest.mark.parametrize("make", [plain, pytest.param(beside_peft, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("values", "stop"),
    [
        pytest.param({}, 3, id="no folds", marks=pytest.mark.slow),
        pytest.param({"fold_steps": 2}, 3, id="between folds"),
        pytest.param({"fold_steps": 3}, 3, id="at a fold"),
        pytest.param({"dense_share": 0.5}, 4, id="after a dense step"),
        pytest.param({"fold_steps": 2}, 4, id="after two folds", marks=pytest.mark.slow),
    ],
)
def test_resumed_equals_uninterrupted(tmp_path: Path, make: Any, values: dict[str, Any], stop: int) -> None:
    straight = make(**values)
    whole = trainer(straight, tmp_path / "whole", max_steps=6)
    whole.train()

    first = trainer(make(**values), tmp_path / "run", [StopAt(stop)], **SAVING)
    first.train()
    assert losses(first) == losses(whole)[:stop]

    resumed = make(**values)
    loaded: list[dict[str, Tensor]] = []
    again = trainer(resumed, tmp_path / "run", [AtStart(lambda _: loaded.append(factors(resumed)))], **SAVING)
    again.train(resume_from_checkpoint=True)
    for name, value in factors(first.model).items():  # U and V come back to the bit
        assert torch.equal(loaded[0][name], value), name
    assert again.state.global_step == 6
    assert losses(again) == pytest.approx(losses(whole), abs=1e-4)
    expected = all_values(straight)
    for name, value in all_values(resumed).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    # The comparison can fail: without the sidecar's factors it is another run.
    assert max((value - expected[name]).abs().max() for name, value in all_values(make()).items()) > 1e-2


def test_sketches_after_folds_are_those_of_the_resumed_run(tmp_path: Path) -> None:
    """A fold updates a sketch without a fit to the new weights, so the sketch depends on when it was fitted."""
    found: list[list[Tensor]] = []

    def note(model: nn.Module, step: int, **kwargs: Any) -> None:
        if step == 4:  # the second fold
            sketches = [mlp.index.sketch for mlp in sparse_mlps(model)]
            found.append([sketch.codes @ sketch.basis for sketch in sketches])

    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        model = patched_opt(fold_steps=2, sketch_rank=4, refresh_steps=0)
        saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 4}
        trainer(model, tmp_path, [Watch(note)], **saving).train(resume_from_checkpoint=checkpoint)
    for first, resumed in zip(*found, strict=True):
        torch.testing.assert_close(resumed, first, rtol=1e-3, atol=1e-3 * first.abs().amax().item())


def test_the_model_that_resumes_is_the_one_that_was_saved(tmp_path: Path) -> None:
    first = trainer(plain(), tmp_path, [StopAt(3)], **SAVING)
    first.train()

    def dense_logits(model: nn.Module) -> Tensor:
        with dense_forward(model), torch.no_grad():
            return model(tokens(99)).logits

    expected, model, found = dense_logits(first.model), plain(), []
    start = AtStart(lambda _: found.append(dense_logits(model)))
    trainer(model, tmp_path, [start], **SAVING).train(resume_from_checkpoint=True)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
    assert (found[0] - dense_logits(model)).abs().max() > 1e-3


def test_every_checkpoint_has_one_sidecar_and_nothing_else_new(tmp_path: Path) -> None:
    settings = {**SAVING, "max_steps": 2}
    trainer(plain(), tmp_path, **settings).train()
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert [c.name for c in checkpoints] == ["checkpoint-1", "checkpoint-2"]
    unpatched = Trainer(model=opt(), args=arguments(tmp_path / "unpatched", **settings), train_dataset=Texts())
    unpatched.train()
    usual = {f.name for f in (tmp_path / "unpatched" / "checkpoint-1").iterdir()}
    for checkpoint in checkpoints:
        assert {f.name for f in checkpoint.iterdir()} == usual | {SIDECAR}


@pytest.mark.parametrize("without", ["optimizer.pt deleted", "save_only_model"])
def test_checkpoint_of_an_unpatched_run(without: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its optimizer held other parameters, and the Trainer loads that before it calls any callback."""
    args = arguments(tmp_path, **{**SAVING, "max_steps": 2}, save_only_model=without == "save_only_model")
    Trainer(model=opt(), args=args, train_dataset=Texts()).train()
    checkpoint = tmp_path / "checkpoint-2"
    trained = type(opt()).from_pretrained(checkpoint)

    def resumed() -> Trainer:
        run = Trainer(model=plain(), args=arguments(tmp_path, max_steps=3, learning_rate=0.0), train_dataset=Texts(),
                      callbacks=[SubquadCallback()])  # fmt: skip
        with caplog.at_level("WARNING"):
            run.train(resume_from_checkpoint=str(checkpoint))
        return run

    if without == "optimizer.pt deleted":
        with pytest.raises(ValueError, match="parameter group"):
            resumed()
        (checkpoint / "optimizer.pt").unlink()
    run = resumed()
    assert SIDECAR in caplog.text and "fresh" in caplog.text
    assert run.state.global_step == 3
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value)


def test_a_checkpoint_without_the_callback_starts_the_updates_afresh(tmp_path: Path) -> None:
    Trainer(model=plain(), args=arguments(tmp_path, **SAVING), train_dataset=Texts(), callbacks=[StopAt(3)]).train()
    saved = type(opt()).from_pretrained(tmp_path / "checkpoint-3")
    model = plain()
    moments: list[bool] = []

    def look(_: nn.Module) -> None:
        live = [f for m in sparse_mlps(model) for p in m.projections for f in p.update.parameters()]
        moments.extend(f in run.optimizer.state for f in live)
        assert len(run.optimizer.state) > 0
        assert all(p.update.is_zero() for m in sparse_mlps(model) for p in m.projections)
        weight = "model.decoder.layers.1.fc1.weight"
        torch.testing.assert_close(model.get_parameter(weight), saved.get_parameter(weight))

    run = trainer(model, tmp_path, [AtStart(look)], **SAVING)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 6
    assert len(moments) == 8 and not any(moments)


@pytest.mark.parametrize("make", [plain, beside_peft])
def test_a_lost_sidecar_is_an_error_that_names_the_newest_whole_checkpoint(tmp_path: Path, make: Any) -> None:
    trainer(make(), tmp_path, [StopAt(3)], **SAVING).train()
    for number, words in (
        (3, "checkpoint-3 has no .* resume from .*checkpoint-2,"),
        (2, "resume from .*checkpoint-1,"),
    ):
        (tmp_path / f"checkpoint-{number}" / SIDECAR).unlink()
        run = trainer(make(), tmp_path, **SAVING)
        with pytest.raises(SidecarError, match=words):
            run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{number}"))
        assert not any(mlp.calls for mlp in sparse_mlps(run.model))
    (tmp_path / "checkpoint-1" / SIDECAR).unlink()
    with pytest.raises(SidecarError, match="no complete checkpoint"):
        trainer(make(), tmp_path, **SAVING).train(resume_from_checkpoint=True)


def test_missing_sidecar_beside_peft_is_an_error(tmp_path: Path) -> None:
    """There it holds the only copy of the updates, whoever wrote the checkpoint."""
    written = beside_peft()
    for mlp in sparse_mlps(written):
        for projection in mlp.projections:
            projection.update.requires_grad_(True)
    Trainer(model=written, args=arguments(tmp_path, **SAVING), train_dataset=Texts(), callbacks=[StopAt(2)]).train()
    run = trainer(beside_peft(), tmp_path, **SAVING)
    with pytest.raises(SidecarError, match="only copy"):
        run.train(resume_from_checkpoint=True)


def test_resume_from_a_named_folder(tmp_path: Path) -> None:
    """From another output folder, as when a run is continued elsewhere."""
    first = trainer(plain(), tmp_path / "old", [StopAt(3)], **SAVING)
    first.train()
    folder = str(tmp_path / "old" / "checkpoint-3")
    model = plain()
    seen: list[dict[str, Tensor]] = []
    start = AtStart(lambda _: seen.append(factors(model)))
    run = trainer(model, tmp_path / "new", [start], resume_from_checkpoint=folder, **SAVING)
    run.train(resume_from_checkpoint=folder)
    assert all(torch.equal(seen[0][name], value) for name, value in factors(first.model).items())


def test_resume_from_an_earlier_checkpoint_of_the_run(tmp_path: Path) -> None:
    settings = {**SAVING, "max_steps": 4}
    trainer(plain(), tmp_path, **settings).train()
    model = plain()
    run = trainer(model, tmp_path, **settings)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    straight = trainer(plain(), tmp_path / "straight", max_steps=4)
    straight.train()
    assert losses(run) == pytest.approx(losses(straight), abs=1e-4)


def test_damaged_sidecar_stops_the_run(tmp_path: Path) -> None:
    trainer(plain(), tmp_path, [StopAt(2)], **SAVING).train()
    path = tmp_path / "checkpoint-2" / SIDECAR
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(SidecarError, match="last_whole_checkpoint"):
        trainer(plain(), tmp_path, **SAVING).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("make", [plain, beside_peft])
def test_best_model_at_end_is_the_best_one(tmp_path: Path, make: Any) -> None:
    """The first evaluation is declared the best; the updates must be those of that step, adapters or not."""
    model = make()
    run = trainer(model, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
                  metric_for_best_model="marked", greater_is_better=True, **{**SAVING, "save_steps": 2})  # fmt: skip
    ids = tokens(98)
    at_best: list[Tensor] = []
    evaluate = Trainer.evaluate

    def marked(self: Trainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = evaluate(self, *args, **kwargs)
        if not at_best:
            model.eval()
            with torch.no_grad():
                at_best.append(model(ids).logits)
            model.train()
        return {**metrics, "eval_marked": -float(self.state.global_step)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "evaluate", marked)
        run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    model.eval()
    with torch.no_grad():
        found = model(ids).logits
    torch.testing.assert_close(found, at_best[0], rtol=1e-4, atol=1e-4)
