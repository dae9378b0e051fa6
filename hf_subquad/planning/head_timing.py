"""How much time a training step saves because the head is limited to the labelled positions."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from ..head.labelled_call import NotHereError, run_on_labelled_rows
from ..head.patch_head import labelled_forward
from .mlp_timing import timed
from .predictions import Batch


@torch.enable_grad()
def head_saved_seconds(model: torch.nn.Module, batch: Batch, dtype: torch.dtype) -> float:
    """Seconds that head and loss save, forward and backward, on the labels of a batch; 0.0 if the head of the model is
    not patched, or if it cannot be run by itself.

    Args:
        dtype: that the model computes in; if it is not the head's, under autocast.
    """
    forward, labels = labelled_forward(model), batch.get("labels")
    if forward is None or forward.way not in ("chunks", "rows") or not isinstance(labels, Tensor):
        return 0.0
    root, way, megabytes = forward.model, forward.way, forward.megabytes
    head = root.get_output_embeddings()
    hidden = torch.randn(*labels.shape, head.in_features, dtype=root.dtype, device=labels.device, requires_grad=True)
    trained = [hidden, *(weight for weight in head.parameters() if weight.requires_grad)]

    def whole(labels: Tensor) -> CausalLMOutput:
        logits = head(hidden)
        loss = root.loss_function(logits=logits, labels=labels, vocab_size=_vocabulary(root))
        return CausalLMOutput(loss=loss, logits=logits)

    def labelled() -> CausalLMOutput:
        outputs: CausalLMOutput = run_on_labelled_rows(root, whole, {"labels": labels}, way, megabytes)
        return outputs

    def step(outputs: Any) -> None:
        torch.autograd.grad(outputs.loss, trained, allow_unused=True)

    with torch.autocast(labels.device.type, dtype=dtype, enabled=dtype != root.dtype):
        try:
            fast = timed(lambda: step(labelled()), labels.device)
        except NotHereError:  # no labels in this batch, say
            return 0.0
        return timed(lambda: step(whole(labels)), labels.device) - fast


def _vocabulary(model: PreTrainedModel) -> int:
    found: int = model.config.get_text_config(decoder=True).vocab_size
    return found
