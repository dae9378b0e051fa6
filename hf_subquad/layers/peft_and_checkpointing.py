"""What in the surrounding model affects how patched MLPs run: PEFT's adapter switch and gradient checkpointing."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_REFERENCE = "ref"  # the name that TRL gives a frozen copy of the adapters, which it compares with


class Surroundings:
    """The model that contains the patched MLPs.

    In a copy of the whole model this refers to the copy; in a copy of a part, still to the original model.

    Args:
        model: without PEFT's or other wrappers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._may_checkpoint = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self._adapter: Any = None

    def adapters_off(self) -> bool:
        """Whether PEFT's adapters are switched off (`disable_adapter`), or TRL's reference adapters are on; trained
        updates must then have no effect. All adapter layers share one state, so one is checked."""
        if self._adapter is None and "peft_config" in vars(self.model):
            self.find_adapter()
        if self._adapter is None:
            return False
        compares = len(getattr(self.model, "peft_config", ())) > 1  # a single adapter of that name is trained
        return self._adapter.disable_adapters or (compares and _REFERENCE in self._adapter.active_adapters)

    def find_adapter(self) -> None:
        """Look for an adapter layer of PEFT's in the model."""
        layers = (m for m in self.model.modules() if isinstance(getattr(type(m), "disable_adapters", None), property))
        self._adapter = next(layers, None)

    def recomputed_without_gradients(self) -> bool:
        """Whether a training pass without gradients may be the first pass of reentrant gradient checkpointing."""
        functions = (
            getattr(m, "_gradient_checkpointing_func", None) for m in self._may_checkpoint if m.gradient_checkpointing
        )
        return any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions)

    @contextmanager
    def checkpointing(self) -> Iterator[None]:
        """Context manager: inside, layers that checkpoint in training do so in evaluation mode, too; not those with
        dropout of their own, and not reentrant checkpointing, which needs a whole backward pass."""
        chosen = [] if self.recomputed_without_gradients() else self._may_checkpoint
        chosen = [m for m in chosen if m.gradient_checkpointing and not m.training and not _drops(m)]
        for module in chosen:
            module.training = True  # of this module alone
        try:
            yield
        finally:
            for module in chosen:
                module.training = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Surroundings":
        if id(self.model) not in memo:
            return self
        memo[id(self)] = copied = copy.copy(self)
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied


def _drops(module: nn.Module) -> bool:
    """Whether a module drops something itself, rather than a module inside."""
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())


def language_model(model: nn.Module) -> PreTrainedModel | None:
    """The outermost transformers model in a model."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
