"""How long a training step takes: before a plan, and with it."""

from typing import Any

import torch
from torch import Tensor, nn

from ..head.patch_head import head_as_in_training, head_in_training
from ..layers.attention_patch import stock_attention, uses_sequence_attention
from ..layers.dense_or_sparse import dense_forward, sparse_forward
from ..layers.patched_mlps import patched_parts
from ..layers.shared_state import loss_of
from ..logs import get_logger
from .divergence import Batch, logits_of
from .fidelity import trained_parameters
from .mlp_timing import timed

# Values with a row for each of the batch. Of others (images, positions in three dimensions) it is not known.
_BY_ROW = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "labels", "decoder_input_ids",
           "decoder_attention_mask")  # fmt: skip
_ENOUGH = 1024  # tokens: with fewer, what does not depend on their number is too much of the time

logger = get_logger(__name__)


@torch.enable_grad()
def time_steps(model: nn.Module, batch: Batch) -> tuple[float, float | None]:
    """Seconds of a dense step, with all neurons, stock head and stock attention, and of one with the current budgets;
    None for the latter if nothing but the MLPs is patched.

    Each is the least of a few, forward and backward, taken in turns, because a machine's speed changes. On a CPU, where
    the time of a large step is in proportion to its rows, half of them run, and the time is doubled. The model must be
    in evaluation mode, in which a patched head computes all logits.

    Raises:
        CalibrationError: nothing is trained, or there are neither logits nor a loss.
    """
    trained = trained_parameters(model)
    runtime, mlps = patched_parts(model)
    device, in_4_bits = mlps[0].output.weight.device, any(mlp.output.quantization is not None for mlp in mlps)
    half = _half(batch) if device.type == "cpu" and not in_4_bits else None  # weights are dequantised in every pass

    def step() -> None:
        outputs = model(**(half or batch))
        loss = loss_of(outputs)
        if loss is None or not loss.requires_grad:
            loss = logits_of(model, outputs).float().log_softmax(-1).amax(-1)
        torch.autograd.grad(loss.sum(), trained, allow_unused=True)

    logger.info("planning: timing steps without and with the plan")
    elsewhere = "labels" in batch and (head_in_training(model) is not None or uses_sequence_attention(model))
    dense, planned = [], []
    with runtime.surroundings.checkpointing():
        for turn in range(2 if half is None else 3):  # the first dense step takes up to 64% longer, to allocate memory
            with dense_forward(model), stock_attention(model):
                dense.append(timed(step, device))
            if elsewhere and (turn or half is None):  # none beside a dense step that warms up
                with sparse_forward(model), head_as_in_training(model):
                    planned.append(timed(step, device))
    whole = 1 if half is None else 2
    return whole * min(dense), whole * min(planned) if planned else None


def _half(batch: Batch) -> dict[str, Any] | None:
    """Half of a batch's rows, with about half of its padding; None if that is not known, or too little."""
    by_row = {name: value for name, value in batch.items() if name in _BY_ROW and isinstance(value, Tensor)}
    others = [value for name, value in batch.items() if name not in by_row]
    plain = all(value is None or isinstance(value, bool | int | float | str) for value in others)
    rows = {len(value) for value in by_row.values()}
    text = by_row.get("input_ids", by_row.get("inputs_embeds"))
    if not plain or len(rows) != 1 or text is None or len(text) % 4 or text.shape[:2].numel() < 2 * _ENOUGH:
        return None
    mask = by_row.get("attention_mask", text.new_ones(len(text), 1))
    from_short_to_long = mask.flatten(1).count_nonzero(1).argsort()
    chosen = torch.cat([from_short_to_long[::4], from_short_to_long[3::4]])  # of four neighbours, the outer two
    return {**batch, **{name: value[chosen] for name, value in by_row.items()}}
