"""Which activation a module or function computes."""

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu_squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}  # those that kernels know, by name

_names: weakref.WeakKeyDictionary[Callable[[Tensor], Tensor], str | None] = weakref.WeakKeyDictionary()


def name_of(activation: Callable[[Tensor], Tensor]) -> str | None:
    """Which of `ACTIVATIONS` a module or function computes; None if it is none of them, or has parameters.

    It is found by evaluating the function on test points, once.
    """
    try:
        if activation not in _names:
            _names[activation] = _recognised(activation)
        return _names[activation]
    except TypeError:  # one that cannot be a key
        return _recognised(activation)


def _recognised(activation: Callable[[Tensor], Tensor]) -> str | None:
    if isinstance(activation, nn.Module) and next(activation.parameters(), None) is not None:
        return None
    far = torch.tensor([-50.0, 50.0], device="cpu", dtype=torch.float32)
    points = torch.cat([torch.linspace(-8, 8, 257, device="cpu", dtype=torch.float32), far])
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            values = activation(points.clone())
        except Exception:  # whatever it cannot do with plain numbers, it is none of ours
            return None
        if not isinstance(values, Tensor) or (values.shape, values.dtype) != (points.shape, points.dtype):
            return None
        for name, function in ACTIVATIONS.items():
            if torch.allclose(values.cpu(), function(points), rtol=1e-5, atol=1e-5):
                return name
    return None
