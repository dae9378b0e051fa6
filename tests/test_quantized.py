"""Do patched MLPs train on a base in 4 bits as on the same base dequantised, and does the base stay in 4 bits?"""

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import models
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_subquad import (
    ConfigError,
    PatchError,
    SubquadConfig,
    UnsupportedModuleError,
    dense_forward,
    merged_named_weights,
    patch_model,
    save_merged,
    sparse_mlps,
    unpatch_model,
)
from hf_subquad.layers.budget import Budget
from hf_subquad.weights.quantized import QuantizedRows, dequantized, is_4bit, quant_state

bnb = pytest.importorskip("bitsandbytes")

WIDTH, NEURONS = 64, 192
CONFIG = SubquadConfig(rank=3, alpha=5.0, tile_size=5, sketch_rank=12, active=0.4, layers_to_transform="all_but_first")
BUDGETS = [Budget(), Budget.uniform(70), Budget(150, 40), Budget(None, 0), Budget(100, 0, 0.9)]
FAMILIES = ("llama", "phi3", "opt", "gpt2")
SIZES = {
    "llama": dict(hidden_size=WIDTH, intermediate_size=NEURONS),
    "phi3": dict(hidden_size=WIDTH, intermediate_size=NEURONS),  # gate and up stacked
    "opt": dict(hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=NEURONS),
    "gpt2": dict(n_embd=WIDTH, n_inner=NEURONS),  # Conv1D
}


def plain(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return models.build(family, dtype, **SIZES[family])


def in_4bit(model: nn.Module, **settings: Any) -> nn.Module:
    """The model with every linear layer but the head in 4 bits, as `from_pretrained` quantises it."""
    settings = {"quant_type": "nf4", "compress_statistics": True, **settings}
    for name, module in list(model.named_modules()):
        if name.endswith("head") or not isinstance(module, nn.Linear | models.transformers.pytorch_utils.Conv1D):
            continue
        weight = module.weight.detach()
        weight = weight if isinstance(module, nn.Linear) else weight.t().contiguous()
        layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], module.bias is not None, **settings)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **settings)
        if module.bias is not None:
            layer.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=False)
        model.set_submodule(name, layer.to("cpu").train())
    return model.requires_grad_(False)


def dequantised(model: nn.Module) -> nn.Module:
    """A copy with plain linear layers of the same values."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if is_4bit(module):
            layer = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            layer.weight = nn.Parameter(dequantized(module.weight, quant_state(module)))
            layer.bias = module.bias
            model.set_submodule(name, layer)
    return model.requires_grad_(False)
