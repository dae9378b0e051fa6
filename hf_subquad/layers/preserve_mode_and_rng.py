"""Run a model in the middle of training without affecting the training."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import nn

from ..weights.quantized import is_4bit


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; on exit, modes are restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        # In evaluation on some CPUs (AVX512_BF16), bitsandbytes rounds scales and packs the weight for good, and then
        # gives no gradients in training either.
        module.training = is_4bit(module)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def preserve_mode_and_rng(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; on exit, modes and the global random states are restored."""
    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(device_type=_accelerator()), torch.no_grad(), evaluating(model):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found else "cuda"  # of which there are none then
