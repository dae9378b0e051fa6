"""The hooks that tell the runtime of a patched model when a forward begins, with its inputs, and when it ends."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .shared_state import Runtime


@dataclass(eq=False)
class BatchHook:
    """A forward pre-hook, and with `end` a forward hook; copying the model copies both."""

    runtime: Runtime

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.runtime.begin(model, _by_name(model, args, kwargs))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end(self, model: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        self.runtime.end()


def watch_batches(model: nn.Module, runtime: Runtime) -> None:
    """Pass every batch that a model is called with to a runtime. A second call for the same model changes nothing.

    Inside DDP or `torch.compile`, the inner model is watched, because they call it with its hooks. PEFT's wrapper may
    call the inner model's `forward` without its hooks, or with more tokens: wrapper and inner model are both watched,
    and the last one to be called counts.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    for watched in (model, runtime.surroundings.model):
        if not any(isinstance(hook, BatchHook) for hook in watched._forward_pre_hooks.values()):
            hook = BatchHook(runtime)
            watched.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            watched.register_forward_hook(hook.end, always_call=True)


def unwatch_batches(model: nn.Module) -> None:
    """Undo `watch_batches`, on a model and all that it wraps."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, BatchHook)]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), BatchHook):
                del module._forward_hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    try:
        return {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
    except TypeError:
        return kwargs
