"""The model, its batches, and what sparse MLPs do to its held-out loss."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from comparison.run_inputs import load_inputs
from comparison.run_settings import RunSettings
from corpus import language_reference_text, standard_library_text
from lm_data import NO_LOSS
from torch import Tensor, nn

from hf_subquad import dense_forward, sparse_forward
from hf_subquad.layers.lookup import sparse_mlps
from hf_subquad.layers.preserve_mode_and_rng import preserve_mode_and_rng
from hf_subquad.layers.sparse_mlp import SparseMLP
from hf_subquad.planning.measurements import seeing_tokens
from hf_subquad.planning.predictions import Batch, Predictions

Corpus = Literal["source", "reference"]

_SOURCE_EVERY = 8  # of the standard library's files, which are more than a study can use


@dataclass(frozen=True)
class Inputs:
    """A model as loaded, and batches that all have the same number of sequences.

    Attributes:
        calibration: the first batches of the training order, as `SubquadCallback` takes them.
        train: one batch for each step.
        held_out: spread evenly over the evaluation data.
    """

    model: nn.Module
    calibration: list[Batch]
    train: list[Batch]
    held_out: list[Batch]


def load(settings: RunSettings, max_eval_rows: int, calibration_batches: int) -> Inputs:
    """Model and batches. Plain text is cut into full blocks; rows of templates are padded to the longest of a batch.

    Raises:
        data.DataError, settings.SettingsError: files or a model that cannot be used; the message says why.
        ValueError: the evaluation data is less than one batch.
    """
    loaded = load_inputs(settings)
    order = _training_order(len(loaded.train), max(settings.steps, calibration_batches) * settings.batch_size, settings)
    rows = loaded.evaluation[:: -(-len(loaded.evaluation) // max_eval_rows)]
    # A smaller last batch would have other tiles than those of training.
    whole = rows[: len(rows) // settings.batch_size * settings.batch_size]
    if not whole:
        raise ValueError(
            f"{settings.eval_file} has {len(rows)} sequences, less than one batch of {settings.batch_size}"
        )

    def batches(sequences: Sequence[Any]) -> list[Batch]:
        size = settings.batch_size
        return [dict(loaded.collate(sequences[i : i + size])) for i in range(0, len(sequences), size)]

    train = batches([loaded.train[i] for i in order])
    return Inputs(loaded.model, train[:calibration_batches], train[: settings.steps], batches(whole))


def _training_order(rows: int, wanted: int, settings: RunSettings) -> list[int]:
    """Row numbers of whole epochs, each shuffled."""
    generator = torch.Generator().manual_seed(settings.seed)
    order: list[int] = []
    while len(order) < wanted:
        order += torch.randperm(rows, generator=generator).tolist()
    return order[:wanted]


def write_corpus(corpus: Corpus, folder: Path) -> dict[str, str]:
    """Text that Python carries as `train_file` and `eval_file`: `source` is what the demo model was trained on (its
    held-out files for evaluation), `reference` is what the demo fine-tunes on."""
    if corpus == "source":
        train, held_out = standard_library_text()
        documents = {"train": train[::_SOURCE_EVERY], "eval": held_out}
    else:
        documents = dict(zip(("train", "eval"), language_reference_text(), strict=True))
    for name, texts in documents.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return {f"{name}_file": str(folder / f"{name}.jsonl") for name in documents}


def mlp_tokens(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Input tokens [N, d] of every patched MLP, by name."""
    tokens: dict[str, Tensor] = {}

    def see(mlp: SparseMLP, x: Tensor) -> None:
        tokens[mlp.name] = x.clone()

    with preserve_mode_and_rng(model), seeing_tokens(model, sparse_mlps(model), see):
        model(**batch)
    return tokens


def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Nats per token that carries loss, with the forward that is set now."""
    total, count = 0.0, 0
    with preserve_mode_and_rng(model):
        for batch in batches:
            targets = int((batch["labels"][:, 1:] != NO_LOSS).sum())
            total += float(model(**batch).loss) * targets
            count += targets
    return total / count


class HeldOut:
    """Held-out batches, and what a patched model's dense forward makes of them now."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self._model, self._batches = model, batches
        with preserve_mode_and_rng(model), dense_forward(model):
            self._dense = [Predictions(model, batch) for batch in batches]
            self.dense_loss = mean_loss(model, batches)

    def damage(self) -> dict[str, float]:
        """What the sparse forward does, with budgets as they are set now, in nats per token: `loss_increase` over the
        dense forward's loss, and `kl`, the mean Kullback-Leibler divergence from its predictions."""
        with preserve_mode_and_rng(self._model), sparse_forward(self._model):
            loss = mean_loss(self._model, self._batches)
            divergences = [dense.divergence() for dense in self._dense]
        return {"loss_increase": loss - self.dense_loss, "kl": sum(divergences) / len(divergences)}
