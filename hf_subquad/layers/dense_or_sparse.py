"""Context managers that run a patched model dense or sparse, whatever its mode."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from .patched_mlps import require_patched
from .shared_state import Forward


def dense_forward(model: nn.Module) -> AbstractContextManager[None]:
    """Context manager: all MLPs run dense (base weights and current updates), in training mode too."""
    return _forced(model, "dense")


def sparse_forward(model: nn.Module) -> AbstractContextManager[None]:
    """Context manager: all patched MLPs run sparse, in evaluation mode too."""
    return _forced(model, "sparse")


@contextmanager
def _forced(model: nn.Module, forward: Forward) -> Iterator[None]:
    before = [(mlp.runtime, mlp.runtime.forward) for mlp in require_patched(model)]
    for runtime, _ in before:
        runtime.forward = forward
    try:
        yield
    finally:
        for runtime, previous in before:
            runtime.forward = previous
