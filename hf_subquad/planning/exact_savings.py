"""How much time a training step saves outside of the MLPs: logits at labelled positions, attention without padding."""

import torch
from torch import nn

from ..head.patch_head import labelled_forward
from ..layers.attention_patch import attends_by_sequences
from ..layers.modes import dense_forward
from .mlp_timing import timed
from .predictions import Batch


@torch.enable_grad()
def saved_outside_mlps(model: nn.Module, batch: Batch, stock_seconds: float) -> float:
    """Seconds that a step with dense MLPs saves, forward and backward; 0.0 if nothing but the MLPs is patched.

    Args:
        stock_seconds: of such a step with the whole head and stock attention.
    """
    head = labelled_forward(model)
    if "labels" not in batch or (head is None and not attends_by_sequences(model)):
        return 0.0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        torch.autograd.grad(model(**batch).loss, trained, allow_unused=True)

    before = head.model.training if head else False
    try:
        if head:
            head.model.training = True  # of this module alone, so that dropout stays off
        with dense_forward(model):
            return max(0.0, stock_seconds - timed(step, next(model.parameters()).device))
    finally:
        if head:
            head.model.training = before
