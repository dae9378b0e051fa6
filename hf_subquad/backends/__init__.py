"""What computes the sparse layers on a device: PyTorch operations anywhere, Triton kernels on GPUs."""

import functools
import os
from importlib.metadata import PackageNotFoundError, version

import torch

from ..config import BackendName
from ..errors import BackendError
from .interface import Backend, EstimatedInput, LiveRows, Scoring
from .torch_backend import TorchBackend

__all__ = ["Backend", "EstimatedInput", "LiveRows", "Scoring", "backend_for"]


def backend_for(name: BackendName, device: torch.device) -> Backend:
    """The backend that computes on a device.

    Triton on NVIDIA devices that have tensor cores for bfloat16 (compute capability 8.0), unless the name is 'torch'
    or, with 'auto', Triton is not installed; PyTorch elsewhere, so that a model can be patched before it is moved.
    With TRITON_INTERPRET=1 in the environment, 'triton' is Triton's interpreter elsewhere: slow, and good for tests.

    Raises:
        BackendError: 'triton' was asked for and is not installed, or too old.
    """
    if name == "triton" and not _triton_installed():
        raise BackendError(
            'backend="triton" needs the package triton, 3.3 or newer, which comes with PyTorch 2.7: install it, or '
            'leave backend at "auto"'
        )
    if device.type == "cuda":
        runs = name != "torch" and _triton_installed() and _has_tensor_cores(device)
    else:
        runs = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return _triton() if runs else _torch()


@functools.cache
def _triton_installed() -> bool:
    """A version that compiles the kernels; 3.2 does not."""
    try:
        major, minor = version("triton").split(".")[:2]
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (3, 3)


@functools.cache
def _has_tensor_cores(device: torch.device) -> bool:
    # PyTorch calls AMD's devices cuda, too; the kernels ask for registers in a way that only NVIDIA's compiler takes.
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _torch() -> Backend:
    return TorchBackend()


@functools.cache
def _triton() -> Backend:
    from .triton_backend import TritonBackend  # reads TRITON_INTERPRET

    return TritonBackend()
