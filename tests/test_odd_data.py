"""Does whatever reaches the planner from training data end in a plan or in dense MLPs, never in the end of training?"""

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers.models import build, opt, tokens
from helpers.training import TRAIN, Texts, arguments, factors, listening
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from transformers import Trainer, default_data_collator

from hf_subquad import SubquadCallback, SubquadConfig, patch_model, sparse_mlps

PLANNED = SubquadConfig(**{**TRAIN.to_dict(), "active": None})


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return listening(monkeypatch, "training.trainer_planning")


class Loaded(Trainer):
    """With a dataloader of the user's making, and a loss that takes what comes."""

    loader: Any = None

    def get_train_dataloader(self) -> Any:
        return self.loader if self.loader is not None else super().get_train_dataloader()

    def _get_num_items_in_batch(self, *args: Any) -> None:
        """The Trainer's own looks for labels by name."""

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        ids = first_tensor(inputs)
        return model(input_ids=ids, labels=ids).loss


def first_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value if value.dim() > 1 else value[None]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    parts = value.values() if hasattr(value, "values") else value
    return next(found for part in parts if part is not None and (found := first_tensor(part)) is not None)


def train(folder: Path, config: SubquadConfig = PLANNED, loader: Any = None, **values: Any) -> nn.Module:
    model = patch_model(opt(), config)
    before = factors(model)
    args = arguments(folder, max_steps=2, remove_unused_columns=False)
    values.setdefault("train_dataset", Texts())
    run = Loaded(model=model, args=args, callbacks=[SubquadCallback()], **values)
    run.loader = loader
    run.train()
    assert run.state.global_step == 2
    assert all(not torch.equal(before[name], value) for name, value in factors(model).items())
    return model


def assert_dense(model: nn.Module, said: list[str], *words: str) -> None:
    assert all(mlp.dense and not mlp.corrections and mlp.runtime.plan is None for mlp in sparse_mlps(model))
    assert len(said) == 1 and "MLPs run dense" in said[0] and "calibrate(model, batches)" in said[0]
    assert all(word in said[0] for word in words), said


# Forms of batches


@dataclasses.dataclass
class Form:
    input_ids: Tensor


def rows(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return default_data_collator(batch)


FORMS: dict[str, Callable[[list[dict[str, Tensor]]], Any]] = {
    "list of rows": lambda batch: batch,
    "tuple": lambda batch: (rows(batch)["input_ids"], rows(batch)["labels"]),
    "tensor": lambda batch: rows(batch)["input_ids"],
    "dataclass": lambda batch: Form(rows(batch)["input_ids"]),
    "nested": lambda batch: {"text": rows(batch), "weight": 1.0},
    "two inputs": lambda batch: {"input_ids_a": rows(batch)["input_ids"], "input_ids_b": rows(batch)["labels"]},
    "other name": lambda batch: {"text": rows(batch)["input_ids"]},
    "strings": lambda batch: {**rows(batch), "attention_mask": ["a"] * len(batch)},
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_that_the_model_does_not_take(form: str, tmp_path: Path, said: list[str]) -> None:
    assert_dense(train(tmp_path, data_collator=FORMS[form]), said)


@pytest.mark.parametrize("form", ["list of rows", "two inputs"])
def test_fixed_budgets_stay(form: str, tmp_path: Path, said: list[str]) -> None:
    model = train(tmp_path, TRAIN, data_collator=FORMS[form])
    assert all(mlp.calls == 2 and not mlp.corrections for mlp in sparse_mlps(model))
    assert len(said) == 1 and "keep the budgets" in said[0]


@pytest.mark.parametrize("more", [{"attention_mask": None}, {"use_cache": False}, {"weights": torch.ones(2)}], ids=str)
def test_what_the_model_takes_besides_is_planned_with(more: Any, tmp_path: Path, said: list[str]) -> None:
    model = train(tmp_path, data_collator=lambda batch: {**rows(batch), **more})
    assert sparse_mlps(model)[0].runtime.plan is not None and not said


def test_batches_of_any_shape_never_end_training(tmp_path: Path, said: list[str]) -> None:
    """Forms put into each other at random."""
    generator = torch.Generator().manual_seed(0)
    wraps: list[Callable[[Any], Any]] = [
        lambda x: [x], lambda x: (x, None), lambda x: {"input_ids": x}, lambda x: {"labels": None, "x": x},
        lambda x: Form(x), lambda x: {1: x}, lambda x: {"input_ids": {"deep": x}},
    ]  # fmt: skip
    from hf_subquad.training.trainer_planning import fit_on_training_data

    for _ in range(40):
        chosen = torch.randint(len(wraps), (int(torch.randint(1, 4, (), generator=generator)),), generator=generator)

        def collate(batch: Any, chosen: Tensor = chosen) -> Any:
            found = rows(batch)["input_ids"]
            for number in chosen.tolist():
                found = wraps[number](found)
            return found

        model = patch_model(opt(num_hidden_layers=2), PLANNED)
        fit_on_training_data(model, DataLoader(Texts(), 2, collate_fn=collate), 2, arguments(tmp_path))
        assert sparse_mlps(model)[0].runtime.plan is not None or all(mlp.dense for mlp in sparse_mlps(model))
        model(tokens(), labels=tokens()).loss.backward()
    assert said


# Dataloaders and datasets


class WithLock:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        with self.lock:
            return rows(batch)


class Batched(torch.utils.data.Dataset):
    """Each item is a batch."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return rows([Texts()[2 * number], Texts()[2 * number + 1]])


LOADERS: dict[str, Callable[[], dict[str, Any]]] = {
    "a collator with a lock": lambda: {"data_collator": WithLock()},
    "a list": lambda: {"loader": [rows([Texts()[i], Texts()[i + 1]]) for i in range(0, 16, 2)]},
    "without batch_size": lambda: {
        "loader": DataLoader(Texts(), batch_sampler=BatchSampler(SequentialSampler(Texts()), 2, False))
    },
    "items that are batches": lambda: {"loader": DataLoader(Batched(), batch_size=None)},
}


@pytest.mark.parametrize("kind", LOADERS)
def test_dataloaders_that_can_be_planned_with(kind: str, tmp_path: Path, said: list[str]) -> None:
    model = train(tmp_path, **LOADERS[kind]())
    plan = sparse_mlps(model)[0].runtime.plan
    assert plan is not None and plan.tokens == 2 * 7 and not said


class Stream(IterableDataset):
    """Rows that are read once, in the order in which they are asked for."""

    def __init__(self) -> None:
        self.read = iter(range(100))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (Texts()[i % 16] for i in self.read)


def test_a_stream_loses_no_row(tmp_path: Path, said: list[str]) -> None:
    stream = Stream()
    model = train(tmp_path, train_dataset=stream)
    assert_dense(model, said, "only be iterated")
    untouched = Stream()
    Trainer(model=opt(), args=arguments(tmp_path, max_steps=2), train_dataset=untouched).train()
    assert next(stream.read) == next(untouched.read)


def test_a_streaming_dataset_of_hugging_face_is_planned_on_and_starts_anew(tmp_path: Path, said: list[str]) -> None:
    def generate() -> Iterator[dict[str, list[int]]]:
        for i in range(16):
            ids = Texts()[i]["input_ids"].tolist()
            yield {"input_ids": ids, "labels": ids}

    seen: list[list[Tensor]] = []
    for patched in (True, False):
        seen.append([])

        class Noting(Trainer):
            def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
                seen[-1].append(inputs["input_ids"])
                return super().training_step(model, inputs, *args, **kwargs)

        dataset = datasets.IterableDataset.from_generator(generate).shuffle(seed=3, buffer_size=8)
        model = patch_model(opt(), PLANNED) if patched else opt()
        Noting(model=model, args=arguments(tmp_path, max_steps=4), train_dataset=dataset,
               callbacks=[SubquadCallback()] if patched else []).train()  # fmt: skip
        if patched:
            assert sparse_mlps(model)[0].runtime.plan is not None and not said
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("fails", ["plan_and_fit", "sample_batches"])
def test_whatever_fails_while_planning(
    fails: str, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(f"hf_subquad.training.trainer_planning.{fails}", fail)
    assert_dense(train(tmp_path), said, "OutOfMemoryError: no memory left")


def test_the_plan_and_its_progress_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "hf_subquad"):
        train(tmp_path)
    assert "planning 2 MLPs on 3 batches" in caplog.text
    assert "Of 14 tokens a batch" in caplog.text and "planned ms" in caplog.text
    assert "planned ms" not in capsys.readouterr().out


def test_interrupted_planning_leaves_no_call_open(tmp_path: Path, said: list[str]) -> None:
    """A model that fails in the middle of a forward pass, on the planner's batches alone."""
    model = patch_model(build("opt"), PLANNED)
    layer = model.model.decoder.layers[2]
    forward = layer.forward

    def fails_in_evaluation(*args: Any, **kwargs: Any) -> Any:
        if not layer.training:
            raise ValueError("not in evaluation")
        return forward(*args, **kwargs)

    layer.register_forward_pre_hook(lambda module, args: fails_in_evaluation() if not module.training else None)
    Trainer(model=model, args=arguments(tmp_path, max_steps=2), train_dataset=Texts(),
            callbacks=[SubquadCallback()]).train()  # fmt: skip
    assert_dense(model, said, "not in evaluation")
