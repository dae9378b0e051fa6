"""Does the patch go along with what else the Trainer can do, one feature a test?"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import CONFIG, NEURONS, batch, build, tokens
from helpers.planning import budgets_of, hand_plan, set_times, trained_head
from helpers.training import TRAIN, Texts, Watch, arguments, factors, losses, patched_opt, trainer
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS, HyperParamSearchBackendBase
from transformers.trainer_utils import HPSearchBackend

from hf_subquad import (
    Plan,
    SubquadCallback,
    SubquadConfig,
    apply_plan,
    dense_forward,
    last_whole_checkpoint,
    patch_model,
    sparse_forward,
    sparse_mlps,
    sync_model,
    unpatch_model,
)
from hf_subquad.layers.patched_mlps import runtime_of

OUT_OF_MEMORY = RuntimeError("CUDA out of memory.")
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}


def live_factors(model: nn.Module) -> list[nn.Parameter]:
    return [f for mlp in sparse_mlps(model) for p in mlp.projections for f in p.update.parameters()]


# Optimizers and their steps


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop"])
def test_optimizers_train_and_restart_after_a_fold(tmp_path: Path, name: str) -> None:
    """After the fold at step 2 an optimizer knows no more of the factors than at the start."""
    model = patched_opt(fold_steps=2)
    before = factors(model)
    known: dict[int, list[dict[str, Any]]] = {}

    def look(_: nn.Module, step: int, optimizer: Any = None, **__: Any) -> None:
        known[step] = [dict(optimizer.state.get(factor, {})) for factor in live_factors(model)]

    run = trainer(model, tmp_path, [Watch(look)], optim=name, max_steps=3)
    run.train()
    assert known[2] == [{}] * 8 and all(known[3]) == all(known[1]) == (name != "sgd")
    assert all(int(state["step"]) == 1 for state in known[3] if "step" in state)
    changed = [not torch.equal(before[place], value) for place, value in factors(model).items()]
    assert all(changed) and all(torch.isfinite(value).all() for value in factors(model).values())


@pytest.mark.parametrize("schedule", ["cosine", "reduce_lr_on_plateau", "constant_with_warmup"])
def test_schedules_and_clipping_reach_the_factors(tmp_path: Path, schedule: str) -> None:
    """With SGD and a norm of 0.01, no step can move all weights together by more than 0.01 of the learning rate."""
    model = patched_opt()
    before = factors(model)
    run = trainer(model, tmp_path, optim="sgd", lr_scheduler_type=schedule, warmup_steps=1, max_steps=3,
                  max_grad_norm=0.01, learning_rate=0.5, eval_strategy="steps", eval_steps=1)  # fmt: skip
    run.train()
    moved = sum((value - before[place]).square().sum() for place, value in factors(model).items()).sqrt().item()
    rates = [row["learning_rate"] for row in run.state.log_history if "learning_rate" in row]
    assert len(rates) == 3 and 0 < moved <= 0.01 * sum(rates) * 1.001


def test_a_scaler_that_skips_a_step() -> None:
    """An infinite gradient: the factors stay, schedules count on, and the next step is taken."""
    model = patched_opt(fold_steps=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    sync_model(model, 0)
    moved = []
    for step in range(1, 4):
        with torch.autocast("cpu", torch.float16):
            loss = model(tokens(step), labels=tokens(step)).loss
        scaler.scale(loss * (float("inf") if step == 2 else 1.0)).backward()
        before = factors(model)
        scaler.step(optimizer)
        scaler.update()
        moved.append([not torch.equal(before[place], value) for place, value in factors(model).items()])
        optimizer.zero_grad()
        report = sync_model(model, step, optimizer)
    assert [any(moves) for moves in moved] == [True, False, True] and all(moved[2])
    assert scaler.get_scale() == 4.0 and report.folded
    assert all(value.isfinite().all() for value in factors(model).values())


# Precision and memory


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_float16_autocast_is_near_float32(family: str) -> None:
    """The sparse gradients of half precision err at most three times as much as the dense ones."""

    def gradient(forward: Any, half: bool) -> Tensor:
        model = patch_model(build(family), SubquadConfig(**{**TRAIN.to_dict(), "active": 0.9}))
        inputs = batch(family, model)["inputs_embeds"].detach()
        with forward(model), torch.autocast("cpu", torch.float16, enabled=half):
            model(inputs_embeds=inputs, labels=tokens()).loss.backward()
        assert all(factor.grad.dtype == torch.float32 for factor in live_factors(model))
        return torch.cat([factor.grad.flatten() for factor in live_factors(model)])

    dense, sparse = (
        (gradient(forward, True) - gradient(forward, False)).norm() / gradient(forward, False).norm()
        for forward in (dense_forward, sparse_forward)
    )
    assert 0 < sparse < 3 * dense < 0.1


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_trains_alike(tmp_path: Path, reentrant: bool) -> None:
    runs = [trainer(patched_opt(fold_steps=2), tmp_path / "without", max_steps=4)]
    runs += [trainer(patched_opt(fold_steps=2), tmp_path / "with", max_steps=4, gradient_checkpointing=True,
                     gradient_checkpointing_kwargs={"use_reentrant": reentrant})]  # fmt: skip
    for run in runs:
        run.train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-6)
    assert [sparse_mlps(run.model)[0].calls for run in runs] == [4, 8]


# Compiled


@pytest.mark.parametrize(
    ("family", "layers"), [("llama", 1), pytest.param("llama", 3, marks=pytest.mark.slow),
                           pytest.param("opt", 3, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_compiled_step_equals_the_plain_one(family: str, layers: int) -> None:
    """From the third step on, nothing is compiled anew. With the compiled mask, attention may run another kernel."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    grads, calls, counts = [], [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = patch_model(build(family, num_hidden_layers=layers), replace(CONFIG, layers_to_transform="all"))
        run = torch.compile(model, backend=backend) if compiled else model
        for seed in (1, 2, 3):
            run(tokens(seed), labels=tokens(seed), use_cache=False).loss.backward()
            counts.append(len(graphs))
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
        calls.append([mlp.calls for mlp in sparse_mlps(model)])
    assert len(grads[0]) > 10
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert calls[0] == calls[1] == [3] * len(calls[0])
    assert 0 == counts[2] < counts[-2] == counts[-1]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_run_equals_the_plain_one(tmp_path: Path, backend: str) -> None:
    runs = [trainer(patched_opt(fold_steps=2, dense_share=0.25), tmp_path / str(compiled), max_steps=4,
                    torch_compile=compiled, torch_compile_backend=backend if compiled else None)
            for compiled in (False, True)]  # fmt: skip
    for run in runs:
        torch._dynamo.reset()
        run.train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-6)
    for name, value in runs[0].model.state_dict().items():
        torch.testing.assert_close(runs[1].model.state_dict()[name], value)
    assert sparse_mlps(runs[1].model)[0].calls == 3


# Batches


class Ragged(Texts):
    """Rows of 3 to 9 tokens."""

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if row >= len(self):
            raise IndexError  # the Trainer iterates for the lengths
        ids = tokens(seed=row, shape=(3 + row % 7,))
        return {"input_ids": ids, "labels": ids}


def pad(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    stack = lambda name, fill: nn.utils.rnn.pad_sequence(  # noqa: E731
        [row[name] for row in rows], batch_first=True, padding_value=fill
    )
    return {"input_ids": stack("input_ids", 2), "labels": stack("labels", -100)}


def test_batches_of_like_length_and_other_losses(tmp_path: Path) -> None:
    """Grouped by length, with smoothed labels and noise on the embeddings."""
    model = patched_opt()
    before = factors(model)
    settings: dict[str, Any] = {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0, "torch_empty_cache_steps": 1,
                                "train_sampling_strategy": "group_by_length", "max_steps": 8}  # fmt: skip
    run = Trainer(model=model, args=arguments(tmp_path, **settings), train_dataset=Ragged(), data_collator=pad,
                  callbacks=[SubquadCallback()])  # fmt: skip
    run.train()
    assert len(losses(run)) == 8 and all(mlp.calls == 8 for mlp in sparse_mlps(model))
    assert all(not torch.equal(before[place], value) for place, value in factors(model).items())
    assert not model.get_input_embeddings()._forward_hooks  # the noise is gone


class LastToken(Trainer):
    """Also draws the last token's features together."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        outputs = model(**inputs, output_hidden_states=True)
        return outputs.loss + outputs.hidden_states[-1][:, -1].square().mean()


def without_last_labels(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    batch = pad(rows)
    batch["labels"][:, -3:] = -100
    return batch


def test_a_loss_that_reads_the_tokens_after_the_last_label(tmp_path: Path) -> None:
    found = []
    for patched in (False, True):
        model = patched_opt(active=1.0) if patched else unpatch_model(patched_opt(active=1.0))
        model.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)
        callbacks = [SubquadCallback()] if patched else []
        run = LastToken(model=model, args=arguments(tmp_path, max_steps=3), train_dataset=Texts(),
                        data_collator=without_last_labels, callbacks=callbacks)  # fmt: skip
        run.train()
        found.append(losses(run))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def first_batch_too_large(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(rows) > 3:
        raise OUT_OF_MEMORY
    return pad(rows)


def test_a_batch_too_large_to_plan_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto_find_batch_size`: planning, too, uses the batch that fits."""
    set_times(monkeypatch)
    trained_head(monkeypatch)
    model = patched_opt(active=None, tolerance=1e-5)
    args = arguments(tmp_path, per_device_train_batch_size=4, auto_find_batch_size=True)
    run = Trainer(model=model, args=args, train_dataset=Texts(), data_collator=first_batch_too_large,
                  callbacks=[SubquadCallback()])  # fmt: skip
    run.train()
    assert run.state.global_step == 6 and run.state.train_batch_size == 3
    assert runtime_of(model).plan.tokens == 3 * 7
    assert all(mlp.calls == 6 for mlp in sparse_mlps(model) if not mlp.dense)


def test_memory_that_runs_out_in_the_middle_of_an_mlp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer starts over with a smaller batch: the plan stays, and so do schedules that count from step 0."""
    set_times(monkeypatch)
    trained_head(monkeypatch)
    model = patched_opt(active=None, tolerance=1e-5, fold_steps=3)
    plans: list[Any] = []

    def run_out(values: Tensor) -> Tensor:
        if model.training and len(plans) == 1 and run.state.global_step == 2:
            raise OUT_OF_MEMORY
        return activate(values)

    class Started(Watch):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                plans.append(runtime_of(model).plan.to_dict())

    activation = model.model.decoder.layers[1].activation_fn
    activate, activation.forward = activation.forward, run_out
    run = trainer(model, tmp_path, [Started(lambda *_, **__: None)], per_device_train_batch_size=4,
                  auto_find_batch_size=True)  # fmt: skip
    run.train()
    assert len(plans) == 2 and run.state.global_step == 6 and run.state.train_batch_size == 3
    assert [layer["name"] for layer in plans[0]["layers"]] == [layer["name"] for layer in plans[1]["layers"]]
    assert plans[0]["tokens"] == plans[1]["tokens"] == 28
    assert all(p.update.restarts == 2 for mlp in sparse_mlps(model) for p in mlp.projections)
    assert all(0 < k <= NEURONS for k in budgets_of(model))


# Evaluating and stopping


def test_early_stopping_and_restored_callbacks(tmp_path: Path) -> None:
    """No score improves twice: training stops, and goes on from its checkpoint with all callbacks remade by it."""

    def early(folder: Path, **settings: Any) -> Trainer:
        return trainer(patched_opt(), folder, [EarlyStoppingCallback(2)], eval_strategy="steps", eval_steps=1,
                       load_best_model_at_end=True, metric_for_best_model="runtime", greater_is_better=True,
                       **{**SAVING, "max_steps": 9, **settings})  # fmt: skip

    run = early(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.trainer.speed_metrics", lambda split, *_, **__: {f"{split}_runtime": 1.0})
        run.train()
        assert run.state.global_step == 3 and run.state.best_global_step == 1
        again = early(tmp_path, restore_callback_states_from_checkpoint=True)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert sum(isinstance(callback, SubquadCallback) for callback in again.callback_handler.callbacks) == 1
    assert again.state.global_step == 3
    assert all("subquad/update_norm" in row for row in again.state.log_history if "loss" in row)


# Saving


@pytest.mark.parametrize("named", [pytest.param(False, marks=pytest.mark.slow), True])
def test_trials_of_a_hyperparameter_search_keep_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """Plan and checkpoints of a trial are in its own folder, and training goes on from there."""
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, TwoTrials)
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)

    def planned(trial: Any) -> nn.Module:
        model = patched_opt(active=None, refresh_steps=0)
        apply_plan(model, hand_plan(model, [52, 26 if trial and trial.number else 13]))
        return model

    run = Trainer(model_init=planned, args=arguments(tmp_path, **SAVING), train_dataset=Texts(),
                  callbacks=[SubquadCallback()])  # fmt: skip
    run.hyperparameter_search(lambda trial: trial.params, backend="optuna", n_trials=2,
                              hp_name=(lambda trial: f"trial {trial.number}") if named else None)  # fmt: skip
    names = ["trial 0", "trial 1"] if named else ["run-0", "run-1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name, active in zip(names, (13, 26), strict=True):
        assert Plan.load(tmp_path / name / "subquad_plan.json").layers[1].predicted == active
        whole = last_whole_checkpoint(tmp_path / name)
        assert whole == str(tmp_path / name / "checkpoint-4")
        again = trainer(patched_opt(active=None, refresh_steps=0), tmp_path / name, max_steps=5)
        again.train(resume_from_checkpoint=whole)
        assert budgets_of(again.model) == [52, active]


class TwoTrials(HyperParamSearchBackendBase):
    """Stands in for optuna, which need not be installed: trains with one learning rate after the other."""

    name = "optuna"

    def ensure_available(self) -> None:
        pass

    def run(self, trainer: Trainer, n_trials: int, direction: str, **_: Any) -> None:
        for number in range(n_trials):
            trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": 10.0 ** -(2 + number)}))


def test_checkpoints_without_an_optimizer(tmp_path: Path) -> None:
    """`save_only_model`: factors and plan come back, moments do not; with SGD that is all there is."""
    settings = {**SAVING, "optim": "sgd", "learning_rate": 0.3}
    straight = trainer(patched_opt(), tmp_path / "straight", **{**settings, "save_strategy": "no"})
    straight.train()
    trainer(patched_opt(), tmp_path / "run", save_only_model=True, **{**settings, "max_steps": 2}).train()
    assert not list((tmp_path / "run").rglob("optimizer.pt"))
    again = trainer(patched_opt(), tmp_path / "run", **settings)
    again.train(resume_from_checkpoint=last_whole_checkpoint(tmp_path / "run"))
    assert losses(again) == pytest.approx(losses(straight), abs=1e-4)


def test_another_limit_of_checkpoints_after_resuming(tmp_path: Path) -> None:
    trainer(patched_opt(), tmp_path, save_total_limit=3, **{**SAVING, "max_steps": 3}).train()
    again = trainer(patched_opt(), tmp_path, save_total_limit=2, **{**SAVING, "max_steps": 5})
    again.train(resume_from_checkpoint=last_whole_checkpoint(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
