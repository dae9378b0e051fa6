"""Limits the head to labelled positions while the Trainer trains, if nothing reads the other logits."""

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..errors import UnsupportedModuleError
from ..head.patch_head import labelled_forward, patch_head
from ..layers.batch_hook import BatchHook
from ..layers.peft_and_checkpointing import language_model

logger = logging.get_logger(__name__)


def start_labelled_head(model: nn.Module, trainer: Trainer | None, megabytes: int) -> None:
    """Patch the head for this training run, unless that is done or switched off, or something may read the logits.

    One log line says that it is on, or why not.
    """
    root = language_model(model)
    if not megabytes or labelled_forward(model) is not None or root is None or root.get_output_embeddings() is None:
        return
    try:
        if reason := reader_of_logits(trainer) or reader_of_outputs(model, root):
            raise UnsupportedModuleError(reason)
        patch_head(model, megabytes)
    except UnsupportedModuleError as error:
        text = f"logits are computed at all positions: {error}"
    else:
        forward = labelled_forward(model)
        assert forward is not None
        forward.automatic = True
        at_a_time = f"in chunks of {megabytes} MB" if forward.method == "chunks" else "all of them at once"
        text = (
            f"in training, logits are computed at labelled positions only, {at_a_time}: loss and gradients are the "
            "same (head_megabytes=0 switches this off)"
        )
    if trainer is None or trainer.is_world_process_zero():
        logger.warning(text)


def own_loss(trainer: Trainer) -> str | None:
    """What a kind of Trainer replaces in computing the loss of a step; None if that is the model's own."""
    kind = type(trainer)
    for name in ("compute_loss", "training_step"):
        # By where it is defined, as scripts also replace the method of Trainer itself.
        if getattr(kind, name).__module__ != Trainer.__module__ or name in vars(trainer):
            return f"{kind.__name__} has a {name} of its own"
    return None


def keeps_labels(trainer: Trainer) -> str | None:
    """Why the Trainer calls the model without labels, and computes the loss itself; None if it does not."""
    if own_loss(trainer):
        return None
    if trainer.compute_loss_func is not None:
        return "compute_loss_func is given"
    return "label_smoothing_factor is set" if trainer.label_smoother is not None else None


def reader_of_logits(trainer: Trainer | None) -> str | None:
    """What may read the logits of a training step, or replaces its forward pass; None if nothing does."""
    if trainer is None:
        return "the Trainer was not found"
    if reason := own_loss(trainer) or keeps_labels(trainer):
        return reason
    args = trainer.args
    if args.use_liger_kernel and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
        return "Liger's fused_linear_cross_entropy is on"
    if args.torch_compile or isinstance(trainer.model, torch._dynamo.OptimizedModule):
        return "the model is compiled"
    if trainer.is_fsdp_enabled:
        return "FSDP may hold a shard of the head's weight outside of the head's own forward"
    return None


def reader_of_outputs(model: nn.Module, root: PreTrainedModel) -> str | None:
    """What around a language model sees its outputs, in a model that contains it; None if nothing does."""
    for module in model.modules():  # from the outside in
        if any(not isinstance(getattr(hook, "__self__", hook), BatchHook) for hook in module._forward_hooks.values()):
            return "a forward hook on the model sees its outputs"
        if module is root:
            break
        hands_on = isinstance(module, nn.parallel.DistributedDataParallel | torch._dynamo.OptimizedModule)
        if not hands_on and not any(kind.__module__.startswith("peft.") for kind in type(module).__mro__):
            return f"the language model is inside a {type(module).__name__}, which may read logits"
    return None
