"""How far a model's predictions on some batches move when its MLPs run sparse."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError

Batch = Mapping[str, Any]

_JUDGED = 1024  # predictions
_LEAST = 1e-4  # information: where there is less, rounding decides


class Predictions:
    """Predictions that a model makes on a batch now, to compare later ones with.

    Args:
        model: whose outputs have logits: scores of classes, or one value for regression.
        batch: keyword arguments of the model.
        logits: what the model makes of the batch, if that is known.

    Raises:
        CalibrationError: there are no logits, or no prediction counts for the loss.
    """

    def __init__(self, model: nn.Module, batch: Batch, logits: Tensor | None = None) -> None:
        self._model, self._batch = model, batch
        logits = logits_of(model, batch) if logits is None else logits
        counted = _counted(model, logits, batch)
        self._positions = counted[:: -(-len(counted) // _JUDGED)]
        self._before = _scores(logits, self._positions)
        self._rows = len(logits)
        by_row = _flat(logits).shape[0] // self._rows
        self._some = (counted // by_row).unique()[:: max(1, round(len(counted) / _JUDGED))]
        self._scale = max(1.0, 1 / max(_information(self._before), _LEAST))

    def some_rows(self) -> Batch | None:
        """Rows of the batch, spread evenly, with about as many predictions as are judged; None if that is all of them,
        or if not all that the batch holds is by row."""
        held = {name: value for name, value in self._batch.items() if hasattr(value, "__len__")}
        by_row = all(isinstance(value, Tensor) and value.shape[:1] == (self._rows,) for value in held.values())
        if not by_row or len(self._some) == self._rows:
            return None
        return {**self._batch, **{name: value[self._some.to(value.device)] for name, value in held.items()}}

    def divergence(self) -> float:
        """Mean Kullback-Leibler divergence, in nats, of the predictions that the model makes now from the former ones;
        of a regression, that of Gaussians of unit variance.

        Predictions of a head that was not trained yet hardly tell one input from another, and so hardly diverge. Both
        grow as the square of the head's size: the divergence is scaled to a head that has learned to tell.

        Raises:
            CalibrationError: predictions are not finite.
        """
        now = _scores(logits_of(self._model, self._batch), self._positions)
        if now.shape[-1] == 1:
            divergence = (now - self._before).square().mean().item() / 2
        else:
            divergence = (self._before.exp() * (self._before - now)).sum(-1).mean().item()
        if not math.isfinite(divergence):
            raise CalibrationError("the model's predictions hold NaN or infinite values")
        return self._scale * max(divergence, 0.0)  # rounding can bring it below


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    outputs = model(**batch)
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        found = ", ".join(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise CalibrationError(
            f"{type(model).__name__} returns no logits (but {found}): calibrate a model with a head, "
            "or set `active` to a fixed share"
        )
    return logits


def _counted(model: nn.Module, logits: Tensor, batch: Batch) -> Tensor:
    """Row numbers of the predictions that count for the loss."""
    shape = logits.shape[:-1] if logits.dim() > 1 else logits.shape
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and labels.shape == shape and not labels.is_floating_point():
        counted = labels != -100
        if _predicts_next(model):
            counted = torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], 1)
        counted = counted.reshape(-1)
    elif isinstance(mask, Tensor) and mask.shape == shape:
        counted = mask.reshape(-1) != 0
    else:
        counted = torch.ones(shape.numel(), dtype=torch.bool, device=logits.device)
    rows = counted.nonzero().squeeze(1)
    if not len(rows):
        raise CalibrationError("no token of a batch counts for the loss: all labels are -100, or all is padding")
    return rows


def _information(scores: Tensor) -> float:
    """How well predictions tell inputs apart, 1 if they do it well: their mutual information with the input, over 1 nat
    or half of what there is to tell; of a regression, the variance."""
    if scores.shape[-1] == 1:
        return scores.var(correction=0).item()
    mean = scores.exp().mean(0)
    told = (scores.exp() * scores).sum(-1).mean() - (mean * mean.clamp_min(1e-30).log()).sum()
    return told.item() / min(1.0, math.log(scores.shape[-1]) / 2)


def _predicts_next(model: nn.Module) -> bool:
    """Whether the label in place t is predicted in place t - 1, as transformers' causal models do."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return getattr(model, "loss_type", None) in (None, "ForCausalLM")


def _flat(logits: Tensor) -> Tensor:
    """[predictions, classes]."""
    return logits.reshape(-1, logits.shape[-1] if logits.dim() > 1 else 1)


def _scores(logits: Tensor, positions: Tensor) -> Tensor:
    """float32 log-probabilities [positions, classes]; of a regression, the values [positions, 1]."""
    rows = _flat(logits)[positions].float()
    return rows if rows.shape[-1] == 1 else rows.log_softmax(-1)
