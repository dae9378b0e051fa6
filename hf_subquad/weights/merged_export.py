"""The plain model of a patched one, with PEFT's adapters merged: its weights by name, and its checkpoint."""

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import PatchError
from .projection_with_update import NeuronProjection
from .quantized import dequantized_state, is_4bit
from .shards import gathered, is_fsdp, reshard, whole

_ADAPTERS = ("peft_config", "_hf_peft_config_loaded")


@torch.no_grad()
def merged_named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, weight) of every parameter and persistent buffer of the plain model.

    Names, shapes and dtypes are those of the model without the patch and without PEFT, as inference engines expect
    them. Weights in 4 bits are dequantised. Low-rank updates and adapters are merged in, one layer at a time, without
    changing the model. Tied weights are yielded once for each of their names. Weights that FSDP2 shards are gathered,
    so all ranks must iterate.

    Args:
        model: patched or not, also wrapped by PEFT, DDP or `torch.compile`.

    Raises:
        PatchError: an adapter cannot be merged (prompt tuning, say).
    """
    bare = _bare(model)
    reshard(bare)  # what FSDP2 has gathered may be rounded to another dtype
    wrapper = ""
    for name, module in bare.named_modules():
        if wrapper and name.startswith(wrapper):  # which has yielded what is inside
            continue
        if hasattr(module, "base_layer") or hasattr(module, "original_module"):
            wrapper = f"{name}."
        state: dict[str, Any] = {}
        if hasattr(module, "base_layer") or isinstance(module, NeuronProjection):
            with gathered([module]):
                state = module.plain_state() if isinstance(module, NeuronProjection) else _merged(name, module)
        elif hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            trained = module.modules_to_save[module.active_adapters[0]] if not module.disable_adapters else None
            state = (trained or module.original_module).state_dict()
        elif hasattr(module, "token_adapter"):  # of trainable_token_indices
            state = _merged(name, module.token_adapter)
        elif hasattr(module, "original_module"):
            raise PatchError(f"what {type(module).__name__} holds for {name} cannot be merged: keep PEFT's checkpoint")
        elif is_4bit(module):
            state = dequantized_state(module)
        else:
            module._save_to_state_dict(state, "", keep_vars=False)
        prefix = f"{name}." if name else ""
        yield from ((prefix + key, whole(value)) for key, value in state.items() if isinstance(value, Tensor))


def save_merged(model: nn.Module, folder: str | os.PathLike[str], **settings: Any) -> None:
    """Write the plain checkpoint of a patched model, with PEFT adapters of any kind merged in. The model is unchanged.

    With adapters, `save_pretrained` and `Trainer.save_model` write only the adapters. A model in 4 bits is written
    dequantised, as a model that was never quantised. Under FSDP2 all ranks must call this, and rank 0 writes.

    Args:
        settings: further arguments of `save_pretrained`.

    Raises:
        PatchError: an adapter cannot be merged, or the model has no `save_pretrained`.
    """
    bare: Any = _bare(model)
    if not hasattr(bare, "save_pretrained"):
        raise PatchError(f"{type(bare).__name__} has no save_pretrained: save dict(merged_named_weights(model))")
    sharded = any(is_fsdp(type(module)) for module in model.modules())
    writes = not sharded or dist.get_rank() == 0
    state = {name: value.cpu() if sharded else value for name, value in merged_named_weights(model) if writes}
    if not writes:
        return
    hidden = [(vars(bare), name) for name in _ADAPTERS]
    patched = (module for module in bare.modules() if isinstance(module, NeuronProjection))
    if any(map(is_4bit, bare.modules())) or any(projection.quantization is not None for projection in patched):
        hidden += [(vars(bare), "hf_quantizer"), (vars(bare.config), "quantization_config")]
    held = [(attributes, name, attributes.pop(name)) for attributes, name in hidden if name in attributes]
    try:
        bare.save_pretrained(folder, state_dict=state, **settings)
    finally:
        for attributes, name, value in held:
            attributes[name] = value


def _bare(model: nn.Module) -> nn.Module:
    """Without the wrappers of DDP, `torch.compile` and PEFT."""
    while isinstance(inner := getattr(model, "_orig_mod", None) or model._modules.get("module"), nn.Module):
        model = inner
    wrapped: Any = model
    if not hasattr(wrapped, "get_base_model"):
        return model
    if any(config.is_prompt_learning for config in wrapped.peft_config.values()):
        raise PatchError("prompts that PEFT has learned cannot be merged into weights: keep its adapter checkpoint")
    return wrapped.get_base_model()


def _merged(name: str, layer: nn.Module) -> dict[str, Tensor]:
    """State of a layer with adapters as it would be after merging them."""
    merged: Any = copy.deepcopy(layer)
    if is_4bit(merged.get_base_layer()):
        return _merged_into_4bit(name, merged)
    try:
        if not merged.disable_adapters:
            merged.merge()
    except Exception as error:
        raise PatchError(f"the adapters of {name} ({type(layer).__name__}) cannot be merged: {error}") from error
    return merged.get_base_layer().state_dict()


def _merged_into_4bit(name: str, layer: Any) -> dict[str, Tensor]:
    """The same for LoRA on a layer in 4 bits; PEFT's own merge would round the result to 4 bits again."""
    state = dequantized_state(layer.get_base_layer())
    names = [] if layer.disable_adapters else [a for a in layer.active_adapters if a in getattr(layer, "lora_A", ())]
    odd = layer.merged or not hasattr(layer, "get_delta_weight") or any(map(layer.lora_variant.get, names))
    if odd or any(layer.lora_bias[adapter] for adapter in names):
        raise PatchError(
            f"the adapters of {name} ({type(layer).__name__}) cannot be merged into weights in 4 bits: only plain LoRA "
            "(no DoRA, no lora_bias) that is not merged yet can"
        )
    weight = state["weight"]
    for adapter in names:
        weight = (weight.float() + layer.get_delta_weight(adapter).float()).to(weight.dtype)
    return state | {"weight": weight}
