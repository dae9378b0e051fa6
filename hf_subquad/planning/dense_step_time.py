"""How long a training step takes with dense MLPs and the stock head and attention."""

from typing import Any

import torch
from torch import Tensor, nn

from ..layers.attention_patch import stock_attention
from ..layers.dense_or_sparse import dense_forward
from ..layers.patched_mlps import patched_parts
from ..layers.runtime import loss_of
from ..logs import get_logger
from .divergence import Batch, logits_of
from .fidelity import trained_parameters
from .mlp_timing import timed

_STEPS = 3  # the first ones also allocate memory, and take up to 64% longer

logger = get_logger(__name__)


@torch.enable_grad()
def dense_step_seconds(model: nn.Module, batch: Batch) -> float:
    """Seconds of a step, forward and backward, with all neurons and all logits; the least of a few.

    On a CPU, where a step's time is in proportion to its rows, half of them run, and the time is scaled up. The model
    must be in evaluation mode, in which a patched head computes all logits.

    Raises:
        CalibrationError: nothing is trained, or there are neither logits nor a loss.
    """
    trained = trained_parameters(model)
    runtime, mlps = patched_parts(model)
    device = mlps[0].output.weight.device
    part, share = _half(batch) if device.type == "cpu" else (batch, 1.0)

    def step() -> None:
        outputs = model(**part)
        loss = loss_of(outputs)
        target = loss if loss is not None and loss.requires_grad else logits_of(model, outputs).float()
        torch.autograd.grad(target.sum(), trained, allow_unused=True)

    logger.info("planning: timing a dense step")
    with dense_forward(model), stock_attention(model), runtime.surroundings.checkpointing():
        return min(timed(step, device) for _ in range(_STEPS)) / share


def _half(batch: Batch) -> tuple[dict[str, Any], float]:
    """The first half of a batch's rows, and their share of all rows. The whole batch and 1.0 if it has fewer than two
    rows, or if its values differ in their number of rows."""
    by_row = {name: value for name, value in batch.items() if not (isinstance(value, Tensor) and not value.dim())}
    by_row = {name: value for name, value in by_row.items() if isinstance(value, Tensor | list | tuple | dict)}
    rows = {len(value) if isinstance(value, Tensor) else 0 for value in by_row.values()}
    count = rows.pop() if len(rows) == 1 else 0
    if count < 2:
        return dict(batch), 1.0
    half = count // 2
    return {**batch, **{name: value[:half] for name, value in by_row.items()}}, half / count
