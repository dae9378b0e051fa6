"""What in the surrounding model affects how patched MLPs run: PEFT's adapter switch and gradient checkpointing."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_REFERENCE = "ref"  # the name that TRL gives a frozen copy of the adapters, which it compares with


class Surroundings:
    """The model that contains the patched MLPs.

    In a copy of the whole model this refers to the copy; in a copy of a part, still to the original model.

    Args:
        model: without PEFT's or other wrappers.
        holders: the modules that hold patched MLPs and may run them under gradient checkpointing.
    """

    def __init__(self, model: nn.Module | None = None, holders: Sequence[nn.Module] = ()) -> None:
        self.model = model
        self._holders = list(holders)
        self._adapter: Any = None

    def adapters_off(self) -> bool:
        """Whether PEFT's adapters are switched off (`disable_adapter`), or TRL's reference adapters are on; trained
        updates must then have no effect. All adapter layers share one state, so one is checked."""
        if self._adapter is None and "peft_config" in vars(self.model or self):
            self.find_adapter()
        if self._adapter is None:
            return False
        return self._adapter.disable_adapters or _REFERENCE in self._adapter.active_adapters

    def find_adapter(self) -> None:
        """Look for an adapter layer of PEFT's in the model."""
        modules = self.model.modules() if self.model is not None else ()
        self._adapter = next(
            (m for m in modules if isinstance(getattr(type(m), "disable_adapters", None), property)), None
        )

    def recomputed_without_gradients(self) -> bool:
        """Whether a training pass without gradients may be the first pass of reentrant gradient checkpointing."""
        return any(
            getattr(holder, "gradient_checkpointing", False)
            and getattr(getattr(holder, "_gradient_checkpointing_func", None), "keywords", {}).get(
                "use_reentrant", True
            )
            for holder in self._holders
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Surroundings":
        if id(self.model) not in memo:
            return self
        memo[id(self)] = copied = Surroundings()
        for name, value in vars(self).items():
            setattr(copied, name, copy.deepcopy(value, memo))
        return copied


def holders(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The modules with a `gradient_checkpointing` flag on the paths to the given modules."""
    found: dict[int, nn.Module] = {}
    for name in names:
        parts = name.split(".") if name else []
        for length in range(len(parts) + 1):
            module = model.get_submodule(".".join(parts[:length]))
            if hasattr(module, "gradient_checkpointing"):
                found[id(module)] = module
    return list(found.values())


def language_model(model: nn.Module) -> PreTrainedModel | None:
    """The outermost transformers model in a model."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
