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
    devices = _accelerators(model)
    kind = next((device.type for device in devices), "cuda")
    try:
        with torch.random.fork_rng(devices, device_type=kind), torch.no_grad(), evaluating(model):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def seed_devices(model: nn.Module, seed: int) -> None:
    """Seed the global random states of the CPU and of the devices that a model is on, and of no others."""
    torch.default_generator.manual_seed(seed)
    for device in _accelerators(model):
        torch.get_device_module(device).set_rng_state(torch.Generator(device).manual_seed(seed).get_state(), device)


def _accelerators(model: nn.Module) -> set[torch.device]:
    """The devices that a model is on, besides the CPU: to read the random state of an idle one would initialise it."""
    return {parameter.device for parameter in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
