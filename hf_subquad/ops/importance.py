"""How much a neuron matters to a token: by its activation, and by how much a small change would move it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]

# How far importance looks beyond the estimate, by pre-activations' root mean square. On an LLM with SwiGLU none at all,
# and 2.5 times as much, cost more of the loss; the gradient hardly cares.
MOVE = 0.1


def importance(pre: list[Tensor], activation: Activation, gated: bool) -> Tensor:
    """Squared activation plus its squared change for a small change of the pre-activations, [S, m].

    The second term keeps neurons that matter little now but could be trained to matter, because their gradient depends
    on that change. It also allows for errors of the estimated pre-activations.

    Args:
        pre: pre-activations [S, m] of one input projection or of gate and up, or both stacked in one [S, 2m].
        gated: neurons are activation(gate) * up.
    """
    if pre[0].dtype is torch.float16:
        pre = [values.float() for values in pre]  # squares leave its range
    if not gated:
        now = activate(activation, pre[0])
        return (activate(activation, pre[0] + MOVE * _spread(pre[0])) - now).square_().add_(now.square())
    gate, up = gate_and_up(pre)
    now, up_squared = activate(activation, gate), up.square()
    moved = (activate(activation, gate + MOVE * _spread(gate)) - now).square_().mul_(up_squared)
    return moved.addcmul_(now.square(), up_squared.add_((MOVE * _spread(up)) ** 2))


def combine(pre: list[Tensor], activation: Activation, gated: bool) -> Tensor:
    """Activations [..., m] of the neurons; arguments as for `importance`."""
    if not gated:
        return activate(activation, pre[0])
    gate, up = gate_and_up(pre)
    return activate(activation, gate) * up


def gate_and_up(pre: list[Tensor]) -> list[Tensor]:
    """Gate and up from two projections, or from both stacked in one."""
    return pre if len(pre) == 2 else list(pre[0].chunk(2, dim=-1))


def activate(activation: Activation, pre: Tensor) -> Tensor:
    """The MLP's activation; one with parameters runs in their dtype, as some cannot mix dtypes."""
    own = next(activation.parameters(), pre) if isinstance(activation, nn.Module) else pre
    return activation(pre.to(own.dtype)).to(pre.dtype)


def _spread(values: Tensor) -> Tensor:
    """Root mean square over each token's neurons, [S, 1]."""
    return torch.linalg.vector_norm(values, dim=1, keepdim=True) / values.shape[1] ** 0.5
