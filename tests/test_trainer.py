"""Does the callback do its part in real Trainer runs: logs, schedules, and loud errors where it could not?"""

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import opt, tokens
from helpers.training import TRAIN, Texts, Watch, arguments, factors, listening, losses, patched_opt, trainer
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer

from hf_subquad import (
    InactivePatchError,
    NotPatchedError,
    SubquadCallback,
    check_active,
    patch_model,
    sparse_mlps,
    sync_model,
    unpatch_model,
)

MEASURED = {"subquad/recall", "subquad/output_error"}
LOGGED = {"subquad/active_share", "subquad/update_norm", "subquad/sync_seconds"} | MEASURED


def test_training_learns_and_changes_only_what_is_trainable(tmp_path: Path) -> None:
    model = patched_opt()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = factors(model)
    run = trainer(model, tmp_path, max_steps=20)
    run.train()
    assert losses(run)[-1] < losses(run)[0] - 0.3
    assert len(frozen) == 8
    assert all(torch.equal(frozen[n], model.get_parameter(n)) for n in frozen)
    assert all(not torch.equal(before[n], value) for n, value in factors(model).items())
    assert all(mlp.calls == 20 for mlp in sparse_mlps(model))


def test_logs_reach_the_history_and_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = patched_opt(refresh_steps=2)
    run = trainer(model, tmp_path, report_to=["tensorboard"], max_steps=4, logging_steps=1, eval_strategy="steps",
                  eval_steps=2)  # fmt: skip
    run.train()
    rows = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(rows) == 4
    assert set(rows[0]) & LOGGED == LOGGED - MEASURED
    assert all(set(row) >= LOGGED for row in rows[1:])
    assert all(0 < row["subquad/recall"] <= 1 for row in rows[1:])
    assert all(
        row["subquad/active_share"] == pytest.approx(0.5 * 6 / 7) for row in rows
    )  # the last token predicts none
    norms = [row["subquad/update_norm"] for row in rows]
    assert norms[0] > 0 and norms == sorted(norms)
    assert all(
        not any(key.startswith("subquad/") for key in entry) for entry in run.state.log_history if "loss" not in entry
    )

    files = list(tmp_path.rglob("events.out.tfevents*"))
    assert files
    events = EventAccumulator(str(files[0].parent))
    events.Reload()
    written = {name.removeprefix("train/"): name for name in events.Tags()["scalars"]}
    assert set(written) >= LOGGED
    values = [event.value for event in events.Scalars(written["subquad/update_norm"])]
    assert values == pytest.approx(norms)


def test_logs_reach_reports_with_add_callback(tmp_path: Path) -> None:
    """A callback added after the Trainer was made is behind the reporting ones until training starts."""
    seen: list[dict[str, float]] = []

    class Reporter(Watch):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    model = patched_opt()
    run = Trainer(model=model, args=arguments(tmp_path, max_steps=2), train_dataset=Texts(),
                  callbacks=[Reporter(lambda *_, **__: None)])  # fmt: skip
    run.add_callback(SubquadCallback())
    run.train()
    assert len([logs for logs in seen if "loss" in logs]) == 2
    assert all("subquad/update_norm" in logs for logs in seen if "loss" in logs)


def test_fold_and_refresh_and_recall_on_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_subquad.index.choose_neurons import ActivationIndex
    from hf_subquad.training import budget_control

    done: dict[str, list[int]] = {"fold": [], "evaluate_selection": [], "refresh": []}
    step = 0
    model = patched_opt(fold_steps=3, refresh_steps=2)
    index = sparse_mlps(model)[0].index
    for name in done:
        holder = budget_control if name == "evaluate_selection" else ActivationIndex
        original = getattr(holder, name)

        def counting(self: Any, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            if self is index:
                done[_name].append(step)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(holder, name, counting)

    class Clock(Watch):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal step
            step = state.global_step + 1

    weights = model.get_parameter("model.decoder.layers.1.fc1.weight").clone()
    run = trainer(model, tmp_path, [Clock(lambda *_, **__: None)], max_steps=7)
    run.train()
    assert done["fold"] == [3, 6]
    assert sorted(set(done["evaluate_selection"]) - {0}) == [2, 4, 6]
    assert sorted(set(done["refresh"]) - {0}) == [2, 4, 6]
    assert not torch.equal(weights, model.get_parameter("model.decoder.layers.1.fc1.weight"))
    assert all(p.update.restarts == 2 for mlp in sparse_mlps(model) for p in mlp.projections)


def test_schedule_counts_optimizer_steps_under_accumulation(tmp_path: Path) -> None:
    steps: list[tuple[int, int, bool]] = []

    def look(model: nn.Module, step: int, **_: Any) -> None:
        mlp = sparse_mlps(model)[0]
        steps.append((step, mlp.calls, mlp.runtime.last_report.folded))

    run = trainer(patched_opt(fold_steps=2, refresh_steps=2), tmp_path, [Watch(look)], max_steps=4,
                  gradient_accumulation_steps=3)  # fmt: skip
    run.train()
    # 16 rows in batches of 2 are 8 micro-batches an epoch: steps of 3, 3 and 2.
    assert steps == [(1, 3, False), (2, 6, True), (3, 8, False), (4, 11, True)]


def test_fold_restarts_moments_and_keeps_the_dense_model(tmp_path: Path) -> None:
    """Between the optimizer step and the end of the step the dense logits stay, the update and its moments go."""
    seen: dict[int, dict[str, Any]] = {}

    class Before(Watch):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.eval()
            with torch.no_grad():
                seen[state.global_step + 1] = {"logits": model(tokens()).logits}
            model.train()

    def look(model: nn.Module, step: int, optimizer: Any = None, **_: Any) -> None:
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(tokens()).logits, seen[step]["logits"], rtol=1e-4, atol=1e-5)
        model.train()
        moments = [
            factor in optimizer.state
            for m in sparse_mlps(model)
            for p in m.projections
            for factor in p.update.parameters()
        ]
        others = [
            state["exp_avg"].abs().max().item()
            for parameter, state in optimizer.state.items()
            if not any(parameter is f for m in sparse_mlps(model) for p in m.projections for f in p.update.parameters())
        ]
        assert len(moments) == 2 * 2 * 2 and min(others) > 0
        seen[step]["moments"] = any(moments)

    model = patched_opt(fold_steps=2)
    trainer(model, tmp_path, [Before(look)], max_steps=4).train()
    assert [seen[step]["moments"] for step in (1, 2, 3, 4)] == [True, False, True, False]


def test_dense_steps(tmp_path: Path) -> None:
    seen: list[tuple[int, int, float]] = []

    def look(model: nn.Module, step: int, **_: Any) -> None:
        mlp = sparse_mlps(model)[0]
        seen.append((step, mlp.calls, mlp.runtime.last_report.active_share))

    model = patched_opt(dense_share=0.5)
    before = factors(model)
    run = trainer(model, tmp_path, [Watch(look)], max_steps=4)
    run.train()
    sparse = pytest.approx(0.5 * 6 / 7)  # the last token of each row predicts none
    assert seen == [(1, 0, sparse), (2, 1, 1.0), (3, 1, sparse), (4, 2, 1.0)]
    assert all(not torch.equal(before[n], value) for n, value in factors(model).items())
    assert [row["subquad/active_share"] for row in run.state.log_history if "loss" in row] == [sparse, 1.0] * 2


def test_evaluation_is_dense_unless_asked(tmp_path: Path) -> None:
    for sparse_eval, expected in ((False, 0), (True, 8)):
        model = patched_opt(sparse_eval=sparse_eval)
        trainer(model, tmp_path, per_device_eval_batch_size=2).evaluate()
        assert sparse_mlps(model)[0].calls == expected


def test_mixed_precision(tmp_path: Path) -> None:
    model = patched_opt()
    run, whole = trainer(model, tmp_path / "bf16", bf16=True), trainer(patched_opt(), tmp_path / "fp32")
    run.train()
    whole.train()
    assert losses(run) == pytest.approx(losses(whole), rel=0.05)
    assert losses(run) != losses(whole)
    assert all(factor.dtype == torch.float32 and factor.isfinite().all() for factor in factors(model).values())


# Errors before the first step


def bypass(model: nn.Module) -> None:
    """Another model answers."""
    other = opt()

    def forward(input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> Any:
        return other(input_ids=input_ids, labels=labels)

    model.forward = forward


def rebind(model: nn.Module) -> None:
    layer = model.model.decoder.layers[2]
    original = type(layer).forward
    layer.forward = types.MethodType(lambda self, *args, **kwargs: original(self, *args, **kwargs), layer)


def replace(model: nn.Module) -> None:
    layer = model.model.decoder.layers[2]
    layer.fc1 = nn.Linear(20, 52)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(rebind, r"layers\.2.*rebound"), (replace, r"layers\.2\.fc1 was replaced")],
)
def test_inactive_patch_is_an_error_before_training(tmp_path: Path, spoil: Any, words: str) -> None:
    model = patched_opt()
    run = trainer(model, tmp_path)
    spoil(model)
    with pytest.raises(InactivePatchError, match=words):
        run.train()
    assert run.state.global_step == 0
    assert not any(mlp.calls for mlp in sparse_mlps(model))


def test_rebound_class_forward_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched_opt()
    layer_class = type(model.model.decoder.layers[2])
    original = layer_class.forward
    monkeypatch.setattr(layer_class, "forward", lambda self, *args, **kwargs: original(self, *args, **kwargs))
    with pytest.raises(InactivePatchError, match="rebound"):
        trainer(model, tmp_path).train()


@pytest.mark.parametrize(
    "kernels", [None, {}, {"rope": False}, {"swiglu": True}, {"swiglu": False, "geglu": True}], ids=str
)
def test_liger_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: dict[str, bool] | None) -> None:
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda *args: None)  # as if it were installed
    args = arguments(tmp_path, use_liger_kernel=True, liger_kernel_config=kernels)
    with pytest.raises(InactivePatchError, match=r"use_liger_kernel.*swiglu.*geglu"):
        Trainer(model=patched_opt(), args=args, train_dataset=Texts(), callbacks=[SubquadCallback()])


@pytest.mark.parametrize("kernels", [{"swiglu": False}, {"geglu": False, "swiglu": False, "rope": True}], ids=str)
def test_liger_without_its_kernels_for_mlps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: dict[str, bool]
) -> None:
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda *args: None)
    settings = {"use_liger_kernel": True, "liger_kernel_config": kernels, "max_steps": 1}
    run = trainer(patched_opt(), tmp_path, **settings)
    run.train()
    assert all(mlp.calls for mlp in sparse_mlps(run.model))

    def rebind(model: nn.Module, _: object) -> None:
        sparse_mlps(model)[0].parent.forward = lambda *args, **kwargs: None

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", rebind)  # the kernel left on is the model's
    with pytest.raises(InactivePatchError, match="rebound"):
        trainer(patched_opt(), tmp_path, **settings).train()


def test_unpatched_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotPatchedError, match="patch_model"):
        trainer(opt(), tmp_path)


def test_a_trainer_that_makes_its_model(tmp_path: Path) -> None:
    """`model_init`: the model that `train` makes is another than the one that the callback saw at first."""
    made: list[nn.Module] = []

    def make() -> nn.Module:
        made.append(patched_opt())
        return made[-1]

    run = Trainer(model_init=make, args=arguments(tmp_path), train_dataset=Texts(), callbacks=[SubquadCallback()])
    before = factors(made[0])
    run.train()
    assert len(made) >= 2 and run.model is made[-1]
    assert all(not torch.equal(before[name], value) for name, value in factors(run.model).items())
    run = Trainer(model_init=lambda: opt(), args=arguments(tmp_path), train_dataset=Texts(), callbacks=[])
    run.add_callback(SubquadCallback())
    with pytest.raises(NotPatchedError):
        run.train()


def test_optimizer_made_before_the_patch_is_an_error(tmp_path: Path) -> None:
    model = opt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    patch_model(model, TRAIN)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    run = Trainer(model=model, args=arguments(tmp_path), train_dataset=Texts(), callbacks=[SubquadCallback()],
                  optimizers=(optimizer, scheduler))  # fmt: skip
    with pytest.raises(InactivePatchError, match="optimizer does not hold"):
        run.train()
    assert run.state.global_step == 0


def test_a_patch_that_is_bypassed_in_training_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was rebound, yet no patched MLP runs. Calls of an earlier run do not count."""
    said = listening(monkeypatch, "training.sync_model", "warning")
    model = patched_opt()
    trainer(model, tmp_path, max_steps=6).train()
    assert not said
    bypass(model)
    trainer(model, tmp_path, max_steps=6).train()
    trainer(model, tmp_path, max_steps=6).train()
    assert len(said) == 2 and "no patched MLP ran sparse" in said[0]


# PEFT beside the patch


def test_peft_all_linear_leaves_the_patched_projections_alone() -> None:
    model = get_peft_model(patch_model(opt(), TRAIN), LoraConfig(r=2, target_modules="all-linear"))
    wrapped = {name.rpartition(".lora_A")[0] for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert {name.rpartition("layers.")[2] for name in wrapped if ".fc" in name} == {"0.fc1", "0.fc2"}
    assert sum(".q_proj" in name for name in wrapped) == 3
    assert all(
        mlp.parent.get_submodule(p) is q
        for mlp in sparse_mlps(model)
        for p, q in zip(mlp.sources, mlp.projections, strict=True)
    )


# The same without a Trainer


def test_custom_loop_does_all_the_callback_does() -> None:
    model = patched_opt(fold_steps=2, refresh_steps=2, dense_share=0.5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    check_active(model, optimizer)
    reports = [sync_model(model, 0)]
    norms = [reports[0].update_norm]
    for step in range(1, 5):
        model(tokens(step), labels=tokens(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        reports.append(sync_model(model, step, optimizer))
        norms.append(reports[-1].update_norm)
    assert [r.step for r in reports] == [0, 1, 2, 3, 4]
    assert [r.folded for r in reports] == [False, False, True, False, True]
    sparse = pytest.approx(0.5 * 4 / 5)  # the last token of each row predicts none
    assert [r.active_share for r in reports] == [1.0, sparse, 1.0, sparse, 1.0]
    assert [r.recall is None for r in reports] == [True, True, False, False, False]
    assert [norm > 0 for norm in norms] == [False, True, False, True, False]
    assert [r.sync_seconds for r in reports] == sorted(r.sync_seconds for r in reports)
    assert reports[-1].recall > 0.5


def test_sync_of_what_is_not_patched() -> None:
    with pytest.raises(NotPatchedError):
        sync_model(opt(), 0)
    with pytest.raises(NotPatchedError):
        check_active(opt())


def test_update_norm_is_that_of_all_updates() -> None:
    from helpers.models import fill_updates

    model = patched_opt()
    fill_updates(model)
    whole = sum(
        (2.0 * p.update.U @ p.update.V).square().sum() for mlp in sparse_mlps(model) for p in mlp.projections
    ).sqrt()
    assert sync_model(model, 1).update_norm == pytest.approx(whole.item(), rel=1e-5)


def test_the_trainer_evaluates_after_unpatching(tmp_path: Path) -> None:
    run = trainer(patched_opt(), tmp_path, max_steps=2)
    run.train()
    loss = run.evaluate(Texts())["eval_loss"]
    unpatch_model(run.model)
    assert run.evaluate(Texts())["eval_loss"] == pytest.approx(loss, rel=1e-5)
