"""Checks that projections can be patched: plain, unsplit, linear and finite. Errors name the ones that cannot."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import SubquadConfig
from ..errors import ConfigError, UnsupportedModuleError, WeightsError
from ..weights.quantized import dequantized_state, is_4bit, quant_state
from .mlp_patterns import Match, linear_sizes

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TRIED_TOKENS = 3
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_projections(match: Match, config: SubquadConfig) -> None:
    """
    Raises:
        UnsupportedModuleError: a projection of the MLP is wrapped, hooked, quantised, split, not linear or has no
            weights yet.
        WeightsError: it holds NaN or infinite values.
        ConfigError: `rank` or `active` exceeds its size, or updates would be folded into weights in 4 bits.
    """
    for path in match.paths:
        module, name = match.projection(path), match.full_name(path)
        if hasattr(module, "base_layer"):
            raise UnsupportedModuleError(
                f"{name} is wrapped by PEFT ({type(module).__name__}): leave the MLP's projections out of PEFT's "
                "target_modules, or out of the patch; both would update the same weight"
            )
        dtype = getattr(getattr(module, "weight", None), "dtype", None)
        in_4bit = is_4bit(module)
        if not in_4bit and (not isinstance(module, nn.Linear | Conv1D) or dtype not in _FLOATS):
            raise UnsupportedModuleError(
                f"{name} is a {type(module).__name__} {f'of {dtype}' if dtype else 'without a weight'}: only plain "
                "nn.Linear and Conv1D projections in floating point, and bitsandbytes' Linear4bit, can be patched; "
                "load the model unquantised or with load_in_4bit=True, or leave the MLP out with exclude_modules"
            )
        if "forward" in vars(module) or any(vars(module)[hooks] for hooks in _HOOKS):
            raise UnsupportedModuleError(
                f"{name} has a forward hook or a forward of its own (device_map offloading? pruning?), which the patch "
                "would drop: remove it (prune.remove), or load the model without device_map"
            )
        if hasattr(module.weight, "device_mesh") or hasattr(module.weight, "ds_id"):  # DTensor's, DeepSpeed's
            raise UnsupportedModuleError(
                f"{name} is split over processes (tensor parallelism, FSDP2 or DeepSpeed ZeRO-3), and indices are made "
                "of whole rows: load the model whole on every process, patch it before fully_shard, or train with DDP"
            )
        if in_4bit and quant_state(module) is None:
            raise UnsupportedModuleError(
                f"{name} is a Linear4bit whose weight is not in 4 bits yet: move the model to its device, then patch"
            )
        if not in_4bit and type(module.weight) is not nn.Parameter:
            raise UnsupportedModuleError(
                f"{name} holds its weight as a {type(module.weight).__name__}, not as a plain parameter (quantised, "
                "sharded, computed?): patch the model before that, or make parametrizations permanent"
            )
        if module.weight.is_meta or module.weight.dim() != 2:
            raise UnsupportedModuleError(
                f"{name} has no weights yet (meta device, or DeepSpeed ZeRO-3): load them before patching"
            )
        for kind, values in dequantized_state(module).items() if in_4bit else module.named_parameters():
            if not torch.isfinite(values).all():
                raise WeightsError(f"{name}.{kind} holds NaN or infinite values: the checkpoint is damaged")
        if in_4bit and config.fold_steps:
            raise ConfigError(
                f"fold_steps={config.fold_steps} would fold updates into {name}, which is in 4 bits, and rounding it "
                "again would lose most of them: set fold_steps=0"
            )
        if not in_4bit and type(module) not in (nn.Linear, Conv1D) and not _computes_linear(module):
            raise UnsupportedModuleError(
                f"{name} is a {type(module).__name__}, which does not compute x W^T + b: only what nn.Linear computes "
                "can be patched"
            )
        if config.rank > min(sizes := linear_sizes(module)):
            raise ConfigError(f"rank={config.rank} exceeds {name}, which is {sizes[::-1]}")
    config.active_neurons(match.neurons)


def check_not_shared(model: nn.Module, matches: Sequence[Match]) -> None:
    """
    Raises:
        UnsupportedModuleError: a weight that would be patched also belongs to another module (a module that is called
            several times counts as one). Their updates would both change it when they are folded or saved.
    """
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for kind, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{name}.{kind}")
    for match in matches:
        for path in match.paths:
            names = holders.get(id(match.projection(path)._parameters.get("weight")), [])
            if len(names) > 1:
                raise UnsupportedModuleError(
                    f"{names[0]} and {names[1]} are one tied parameter, and an update of one would change both: leave "
                    "these MLPs out with exclude_modules, or give each a weight of its own"
                )


@torch.no_grad()
def _computes_linear(module: nn.Module) -> bool:
    """Whether a subclass of Linear or Conv1D computes the same, on random input."""
    weight = module.get_parameter("weight")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TRIED_TOKENS, linear_sizes(module)[0], generator=generator, dtype=torch.float32, device="cpu").to(
        weight
    )
    bias: torch.Tensor | None = getattr(module, "bias", None)
    expected = F.linear(x, weight.t() if isinstance(module, Conv1D) else weight, bias)
    try:
        difference = (module(x) - expected).abs()
    except Exception:  # of whatever kind: it is refused by name
        return False
    tolerance = 4 * torch.finfo(x.dtype).eps * x.shape[1] ** 0.5 * expected.abs().amax()
    return difference.shape == expected.shape and bool((difference <= tolerance).all())
