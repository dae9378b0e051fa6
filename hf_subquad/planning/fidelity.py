"""How close a model with sparse MLPs is to the dense one, in its predictions and in the gradient of what is trained."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..head.patch_head import head_as_in_training
from ..layers.autograd_graph import leaves_behind
from ..layers.forward_passes import computed_again
from ..layers.patched_mlps import runtime_of, sparse_mlps
from ..layers.shared_state import loss_of
from .divergence import Batch, Predictions, logits_of


@dataclass(frozen=True)
class Fidelity:
    """The effect of sparse MLPs on a model, on one batch.

    Attributes:
        divergence: mean Kullback-Leibler divergence of its predictions, in nats per prediction; 0 where the outputs
            have no logits.
        cosine: of the gradient with the exact one. A gradient here is that of the trained parameters that some MLP's
            output depends on: a new classification head has nearly all of the whole gradient at first, and hardly an
            error of its own.
        gradient_error: norm of the gradient's error over the norm of the exact gradient.
    """

    divergence: float
    cosine: float
    gradient_error: float

    @property
    def lost(self) -> float:
        """Share of the squared gradient that points elsewhere, 1 - cosine^2."""
        return max(0.0, 1 - max(0.0, self.cosine) ** 2)

    def beyond(self, rounding: "Fidelity", share: float) -> "Fidelity":
        """Without this share of the effects of rounding. Independent errors add as squares, and so do divergences."""
        lost = max(0.0, self.lost - share * rounding.lost)
        error = max(0.0, self.gradient_error**2 - share * rounding.gradient_error**2)
        cosine = self.cosine if self.cosine <= 0 else math.sqrt(1 - lost)
        return Fidelity(max(0.0, self.divergence - share * rounding.divergence), cosine, math.sqrt(error))


class DenseReference:
    """A model's current predictions and gradient on a batch, to compare later ones with.

    Args:
        batch: keyword arguments of the model. With labels, the gradient is that of the model's own loss, otherwise that
            of the log-probability of the most likely class, at all tokens but padding.

    Raises:
        CalibrationError: there are neither logits nor a loss, nothing is trained, or values are not finite.
    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self._model, self._batch, self._surroundings = model, batch, runtime_of(model).surroundings
        self._trained = trained_parameters(model)
        self._predictions: Predictions | None = None
        with _reached(model) as reached:
            _, gradient = self.step()
        below = [id(parameter) in reached for parameter in self._trained]
        # While a new head is zero, no gradient gets below it: then the gradient of all trained parameters is compared.
        self._compared = below if _norm(list(compress(gradient, below))) else [True] * len(below)
        self._gradient = list(compress(gradient, self._compared))
        self._norm = _norm(self._gradient)
        if not math.isfinite(self._norm):
            raise CalibrationError("the gradient holds NaN or infinite values: the model has diverged")

    def fidelity(self) -> Fidelity:
        """Fidelity of the model with its current budgets.

        Raises:
            CalibrationError: predictions or gradients are not finite.
        """
        logits, gradient = self.step()
        divergence = 0.0 if self._predictions is None or logits is None else self._predictions.divergence(logits)
        gradient = list(compress(gradient, self._compared))
        norm = _norm(gradient)
        if not math.isfinite(norm):
            raise CalibrationError("the gradient of the sparse model holds NaN or infinite values")
        if not norm or not self._norm:
            return Fidelity(divergence, float(norm == self._norm), float(norm != self._norm))
        pairs = list(zip(gradient, self._gradient, strict=True))
        error = _norm([a - b for a, b in pairs])
        cosine = sum(torch.sum(a.double() * b.double()).item() for a, b in pairs) / (norm * self._norm)
        return Fidelity(divergence, min(cosine, 1.0), error / self._norm)

    def rounding(self, first: nn.Module) -> Fidelity:
        """Fidelity of the model if the output of `first`, an output projection, is rounded otherwise: in bf16 and
        float16, what any change adds to its own effect, as all that follows is rounded otherwise, too."""

        def rounded_otherwise(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            last_place = torch.finfo(y.dtype).eps * (torch.rand_like(y, dtype=torch.float32) - 0.5)
            return (y * (1 + last_place)).to(y.dtype)

        with first.register_forward_hook(rounded_otherwise):
            return self.fidelity()

    @torch.enable_grad()
    def step(self) -> tuple[Tensor | None, list[Tensor]]:
        """Logits, if there are any, and gradient of the model with its current budgets, in evaluation mode. With a
        patched head, logits are those of the labelled rows, computed as in training."""
        # Without checkpointing, activations may not fit.
        with head_as_in_training(self._model, keep_logits=True), self._surroundings.checkpointing():
            return self._step()

    def _step(self) -> tuple[Tensor | None, list[Tensor]]:
        outputs = self._model(**self._batch)
        loss = loss_of(outputs)
        has_loss = loss is not None and loss.requires_grad
        try:
            logits: Tensor | None = logits_of(self._model, outputs)
        except CalibrationError:
            if not has_loss:
                raise
            logits = None
        if logits is not None and self._predictions is None:
            self._predictions = Predictions(self._model, self._batch, logits.detach())
        target: Any = loss
        if not has_loss and self._predictions is not None and logits is not None:
            target = self._predictions.confidence(logits)
        found = torch.autograd.grad(target.sum(), self._trained, allow_unused=True)
        return None if logits is None else logits.detach(), [
            torch.zeros_like(p) if g is None else g for p, g in zip(self._trained, found, strict=True)
        ]


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters with `requires_grad`.

    Raises:
        CalibrationError: there are none.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise CalibrationError("no parameter of the model is trained, so there is no gradient to compare")
    return trained


@contextmanager
def _reached(model: nn.Module) -> Iterator[set[int]]:
    """Context manager: collects the ids of the parameters that the outputs of MLPs depend on."""
    found: set[int] = set()

    def note(module: nn.Module, args: Any, y: Tensor) -> None:
        if not computed_again():  # walking the graph of a repeated layer would keep it
            found.update(leaves_behind([y]))

    with ExitStack() as hooks:
        for mlp in sparse_mlps(model):
            hooks.enter_context(mlp.output.register_forward_hook(note))
        yield found


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(torch.linalg.vector_norm(t, dtype=torch.float64).item() ** 2 for t in tensors))
