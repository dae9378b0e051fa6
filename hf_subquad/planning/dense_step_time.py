"""How long a training step takes with dense MLPs and the stock head and attention."""

import torch
from torch import nn

from ..layers.attention_patch import stock_attention
from ..layers.dense_or_sparse import dense_forward
from ..layers.patched_mlps import patched_parts
from ..layers.runtime import loss_of
from ..logs import get_logger
from .divergence import Batch, logits_of
from .fidelity import trained_parameters
from .mlp_timing import timed

logger = get_logger(__name__)


@torch.enable_grad()
def dense_step_seconds(model: nn.Module, batch: Batch) -> float:
    """Seconds of a step, forward and backward in evaluation mode; the shorter of two.

    The first pass of a process, or the first after passes of less memory, takes 9% to 64% longer, to allocate more.

    Raises:
        CalibrationError: nothing is trained, or there are neither logits nor a loss.
    """
    trained = trained_parameters(model)
    runtime, mlps = patched_parts(model)

    def step() -> None:
        outputs = model(**batch)
        loss = loss_of(outputs)
        target = loss if loss is not None and loss.requires_grad else logits_of(model, outputs).float()
        torch.autograd.grad(target.sum(), trained, allow_unused=True)

    logger.info("planning: timing a dense step")
    with dense_forward(model), stock_attention(model), runtime.surroundings.checkpointing():
        return min(timed(step, mlps[0].output.weight.device) for _ in range(2))
