"""How far a model's predictions on a batch move when its MLPs run sparse."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..layers.classify_tokens import predicts_next_token

Batch = Mapping[str, Any]

_JUDGED = 1024  # predictions
_AT_ONCE = 64  # of them: temporaries of a large vocabulary are large
_LEAST = 1e-4  # information: where there is less, rounding decides
_NAMES = ("logits", "prediction_logits")


class Predictions:
    """A model's predictions on a batch, to compare later ones with.

    They are categorical distributions for classification, one Bernoulli distribution per label for multi-label
    outputs, and Gaussians of unit variance for regression; `problem_type` in the config or the labels decide which.

    Args:
        batch: keyword arguments of the model.
        logits: the model's output for the batch.

    Raises:
        CalibrationError: no prediction counts for the loss.
    """

    def __init__(self, model: nn.Module, batch: Batch, logits: Tensor) -> None:
        labels = batch.get("labels")
        self._channels_first = _channels_first(logits, labels)
        self._kind = _kind(model, logits, labels)
        logits = self._classes_last(logits)
        self._counted = _counted(model, logits, batch)
        self._positions = self._counted[:: -(-len(self._counted) // _JUDGED)]
        self._before = self._scores(logits)
        self._scale = max(1.0, 1 / max(self._information(), _LEAST))

    def divergence(self, logits: Tensor) -> float:
        """Mean Kullback-Leibler divergence, in nats per prediction, of these predictions from the earlier ones.

        An untrained head hardly distinguishes inputs, so its predictions hardly diverge. Both effects grow as the
        square of its weights, so the divergence is scaled up to that of a trained head.

        Raises:
            CalibrationError: predictions are not finite.
        """
        now, before = self._scores(self._classes_last(logits)), self._before
        if self._kind == "values":
            divergence = (now - before).square().sum(-1).mean().item() / 2
        else:
            pairs = zip(before.split(_AT_ONCE), now.split(_AT_ONCE), strict=True)
            divergence = sum(_kullback_leibler(*pair) for pair in pairs) / len(before)
        if not math.isfinite(divergence):
            raise CalibrationError("the model's predictions hold NaN or infinite values")
        return self._scale * max(divergence, 0.0)  # rounding can bring it below

    def confidence(self, logits: Tensor) -> Tensor:
        """Mean log-probability of the most likely classes, or mean value: a stand-in for the loss, where labels that
        are not here have no part in it."""
        scores = self._scores(self._classes_last(logits), self._counted)
        return scores.mean() if self._kind == "values" else scores.amax(-1).mean()

    def _classes_last(self, logits: Tensor) -> Tensor:
        return logits.movedim(1, -1) if self._channels_first else logits

    def _scores(self, logits: Tensor, positions: Tensor | None = None) -> Tensor:
        """float32: log-probabilities of classes [positions, classes], or of each label [positions, labels, 2]; or
        values [positions, n]."""
        rows = logits.reshape(-1, logits.shape[-1] if logits.dim() > 1 else 1)
        rows = rows[self._positions if positions is None else positions].float()
        if self._kind == "labels":
            return torch.stack([nn.functional.logsigmoid(rows), nn.functional.logsigmoid(-rows)], -1)
        return rows.log_softmax(-1) if self._kind == "classes" else rows

    def _information(self) -> float:
        """How well predictions distinguish inputs, 1 if they do it well: their mutual information with the input, over
        1 nat or half of the largest possible; for values, their variance."""
        scores = self._before
        if self._kind == "values":
            return scores.var(0, correction=0).mean().item()
        mean = scores.exp().mean(0)
        told = (scores.exp() * scores).sum(-1).mean() - (mean * mean.clamp_min(1e-30).log()).sum(-1).mean()
        return told.item() / min(1.0, math.log(scores.shape[-1]) / 2)


def _kullback_leibler(before: Tensor, now: Tensor) -> float:
    """Sum of the divergences of distributions, given as log-probabilities [..., classes].

    Probabilities sum to 1, so it is the sum of p (e^d - 1 - d), with d the change of log p. None of these terms is
    negative, and where nothing but rounding changed, they are of its square.
    """
    p, change = before.exp(), now - before
    small, large = p * (torch.expm1(change) - change), now.exp() - p * (1 + change)  # which does not overflow
    return torch.where(change.abs() < 1, small, large).sum().item()


def logits_of(model: nn.Module, outputs: Any) -> Tensor:
    """The logits in a model's outputs; for question answering, those of start and end, [B, 2, S].

    Raises:
        CalibrationError: there are none.
    """
    held = outputs if isinstance(outputs, Mapping) else getattr(outputs, "__dict__", {})
    for name in _NAMES:
        if isinstance(held.get(name), Tensor):
            return held[name]
    start, end = held.get("start_logits"), held.get("end_logits")
    if isinstance(start, Tensor) and isinstance(end, Tensor):
        return torch.stack([start, end], 1)
    found = ", ".join(map(str, held)) or type(outputs).__name__
    raise CalibrationError(
        f"{type(model).__name__} returns no logits (only {found}): calibrate a model with a head, or set `active` to a "
        "fixed share"
    )


def _channels_first(logits: Tensor, labels: Any) -> bool:
    """Whether classes are the second dimension, as in segmentation: labels [B, H, W], logits [B, C, h, w]."""
    return isinstance(labels, Tensor) and logits.dim() > 3 and labels.dim() == logits.dim() - 1


def _kind(model: nn.Module, logits: Tensor, labels: Any) -> Literal["classes", "labels", "values"]:
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem == "multi_label_classification":
        return "labels"
    if problem == "regression" or logits.dim() < 2 or logits.shape[-1] == 1:
        return "values"
    if isinstance(labels, Tensor) and labels.is_floating_point() and labels.shape == logits.shape:
        return "labels" if problem is None and bool(((labels == 0) | (labels == 1)).all()) else "values"
    return "classes"


def _counted(model: nn.Module, logits: Tensor, batch: Batch) -> Tensor:
    """Row numbers of the predictions that count for the loss."""
    shape = logits.shape[:-1] if logits.dim() > 1 else logits.shape
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)  # then labels are the decoder's
    labels, mask = batch.get("labels"), batch.get("decoder_attention_mask" if encodes else "attention_mask")
    if isinstance(labels, Tensor) and labels.shape == shape and not labels.is_floating_point():
        counted = labels != -100
        if labels.dim() == 2 and predicts_next_token(model) is not False:
            counted = torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], 1)
        counted = counted.reshape(-1)
    elif isinstance(mask, Tensor) and mask.shape == shape:
        counted = mask.reshape(-1) != 0
    else:
        counted = torch.ones(shape.numel(), dtype=torch.bool, device=logits.device)
    rows = counted.nonzero().squeeze(1)
    if not len(rows):
        raise CalibrationError("no token of a batch counts for the loss: all are labelled -100, or all are padding")
    return rows
