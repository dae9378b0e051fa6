"""The Gram-Gauss-Newton step of Cai et al. 2019 and Song, Zhang, Zhang 2021 (arXiv 2112.07628), in the Trainer.

Each of n sequences has one output. J [n, P] is their Jacobian with respect to the P trained weights, g [n] and h [n]
are first and second derivative of each sequence's loss with respect to its output. The step is -eta J^T z with
(diag(h) J J^T + lambda I) z = g, a system as large as the batch and not as large as the model. It equals
-eta (J^T diag(h) J + lambda I)^-1 J^T g, the damped generalised Gauss-Newton step.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer


class Output(NamedTuple):
    """A sequence's output, a scalar with a graph, and the derivatives of its loss with respect to it."""

    value: Tensor
    first: Tensor
    second: Tensor


OutputOf = Callable[[Tensor, Tensor], Output]  # of the logits [C] and the label of a sequence


def squared_error(logits: Tensor, label: Tensor) -> Output:
    """Regression: the output is the prediction f, the loss (f - y)^2 / 2, half of what the model reports."""
    return Output(logits[0], logits[0].detach() - label, torch.tensor(1.0))


def logit_difference(logits: Tensor, label: Tensor) -> Output:
    """Two classes: the output is the difference of the logits, of which the cross-entropy is a function."""
    difference = logits[1] - logits[0]
    p = difference.detach().sigmoid()
    return Output(difference, p - label, p * (1 - p))


def root_loss(logits: Tensor, label: Tensor) -> Output:
    """More classes: the cross-entropy l as half the square of a residual sqrt(2 l).

    One row for a sequence. The Hessian of the softmax would need a row, hence a backward pass, for every class.
    """
    loss = F.cross_entropy(logits, label)
    return Output(loss, torch.tensor(1.0), 1 / (2 * loss.detach().clamp_min(1e-6)))


def rows_of(
    model: nn.Module, batch: Mapping[str, Tensor], output_of: OutputOf, weights: list[nn.Parameter]
) -> tuple[Tensor, Tensor, Tensor]:
    """J [n, P], g [n] and h [n] of a batch, by a forward and a backward pass for each sequence."""
    rows, first, second = [], [], []
    for number, label in enumerate(batch["labels"]):
        inputs = {name: values[number : number + 1] for name, values in batch.items() if name != "labels"}
        output = output_of(model(**inputs).logits[0], label)
        rows.append(torch.cat([part.flatten() for part in torch.autograd.grad(output.value, weights)]))
        first.append(output.first)
        second.append(output.second)
    return torch.stack(rows), torch.stack(first), torch.stack(second)


def direction(jacobian: Tensor, first: Tensor, second: Tensor, damping: float) -> Tensor:
    """J^T z [P], lambda being `damping` times the mean diagonal entry of diag(h) J J^T.

    The system is solved in float64: with little damping it is ill-conditioned.
    """
    system = second.double().unsqueeze(1) * (jacobian @ jacobian.t()).double()
    system.diagonal().add_(damping * system.diagonal().mean())
    return jacobian.t() @ torch.linalg.solve(system, first.double()).to(jacobian.dtype)


def set_gradients(weights: list[nn.Parameter], flat: Tensor) -> None:
    """Hand a direction [P] to an optimizer as if it were the gradient."""
    for weight, part in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
        weight.grad = part.view_as(weight)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


class GaussNewtonTrainer(Trainer):
    """A Trainer whose gradient is the Gauss-Newton direction; for `optim="sgd"`, whose learning rate is eta, unclipped.

    It logs the batch's mean loss before the step, as the Trainer does.
    """

    def __init__(self, *args: Any, output_of: OutputOf, damping: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._output_of, self._damping = output_of, damping

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        model.train()
        batch = self._prepare_inputs(inputs)
        weights, losses = trained(model), []

        def seen(logits: Tensor, label: Tensor) -> Output:
            losses.append(reported_loss(logits.detach(), label))
            return self._output_of(logits, label)

        set_gradients(weights, direction(*rows_of(model, batch, seen, weights), self._damping))
        return torch.stack(losses).mean()


def reported_loss(logits: Tensor, label: Tensor) -> Tensor:
    """What a Hugging Face head reports for one sequence: the squared error of one logit, else cross-entropy."""
    return (logits[0] - label) ** 2 if len(logits) == 1 else F.cross_entropy(logits, label)
