"""The backends of the sparse layers: PyTorch operations on any device, Triton kernels on GPUs."""

import functools
import os
from importlib.metadata import PackageNotFoundError, version

import torch
from transformers.utils import logging

from ...config import BackendName
from ...errors import BackendError
from .interface import Backend, MergedWeight, Scoring, StoredRows
from .torch_backend import TorchBackend
from .verification import mismatch

__all__ = ["Backend", "MergedWeight", "Scoring", "StoredRows", "backend_for"]

logger = logging.get_logger(__name__)

_TORCH = TorchBackend()
_verified: dict[torch.device, str | None] = {}  # where the kernels were tried: what they computed wrong, if anything


def backend_for(name: BackendName, device: torch.device) -> Backend:
    """The backend that computes on a device.

    That is Triton on NVIDIA devices with tensor cores for bfloat16 (compute capability 8.0), unless the name is 'torch'
    or, with 'auto', Triton is not installed or its kernels fail the check that runs once per device and process. Other
    devices use PyTorch, so that a model can be patched before it is moved. With TRITON_INTERPRET=1 in the environment,
    'triton' uses Triton's interpreter on other devices, which is slow and meant for tests.

    Raises:
        BackendError: 'triton' was requested and is not installed, is too old, or gives other results than PyTorch.
    """
    if name == "triton" and not _triton_installed():
        raise BackendError(
            'backend="triton" needs the package triton, 3.3 or newer, which comes with PyTorch 2.7: install it, or '
            'leave backend at "auto"'
        )
    if device.type != "cuda":
        return _triton() if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1" else _TORCH
    if name == "torch" or not _triton_installed() or not _has_tensor_cores(device):
        return _TORCH
    wrong = _mismatch(device)
    if wrong is None:
        return _triton()
    if name == "triton":
        raise BackendError(
            f"on {device} Triton's kernels do not compute what PyTorch does: {wrong}. Leave backend at 'auto', which "
            "uses PyTorch there, and please report this with the output of `hf-subquad env`"
        )
    logger.warning_once(
        f"on {device} Triton's kernels do not compute what PyTorch does: {wrong}. PyTorch computes the sparse layers "
        "there. Please report this with the output of `hf-subquad env`"
    )
    return _TORCH


def _mismatch(device: torch.device) -> str | None:
    """What Triton's kernels compute wrong on a CUDA device, if anything; checked on the first call."""
    if device in _verified:  # asked many times a step
        return _verified[device]
    # A capture cannot wait for results; the check is made at the next call outside of it.
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_current_stream_capturing():
        return None
    return _verified.setdefault(device, mismatch(_triton(), device))


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
def _triton() -> Backend:
    from .triton_backend import TritonBackend  # reads TRITON_INTERPRET

    return TritonBackend()
