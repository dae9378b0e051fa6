"""How much time a training step saves outside of the MLPs: no padding, and logits at labelled positions only."""

import torch
from torch import nn

from ..head.patch_head import head_as_in_training, head_in_training
from ..layers.attention_patch import attends_by_sequences
from ..layers.dense_or_sparse import sparse_forward
from ..layers.patched_mlps import runtime_of
from ..layers.runtime import loss_of
from .divergence import Batch, logits_of
from .mlp_timing import timed


@torch.enable_grad()
def saved_outside_mlps(model: nn.Module, batch: Batch, expected_seconds: float) -> float:
    """Seconds by which a step with the current budgets, forward and backward, is shorter than expected; 0.0 if nothing
    but the MLPs is patched.

    Args:
        expected_seconds: of a dense step, less what the budgets save in the MLPs.
    """
    if "labels" not in batch or (head_in_training(model) is None and not attends_by_sequences(model)):
        return 0.0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        outputs = model(**batch)
        loss = loss_of(outputs)
        target = logits_of(model, outputs).float() if loss is None else loss
        torch.autograd.grad(target.sum(), trained, allow_unused=True)

    with head_as_in_training(model), sparse_forward(model), runtime_of(model).surroundings.checkpointing():
        return max(0.0, expected_seconds - timed(step, trained[0].device))
