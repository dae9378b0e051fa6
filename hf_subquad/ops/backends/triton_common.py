"""Helpers shared by the launchers of Triton kernels."""

import os
from functools import lru_cache

import torch
import triton
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton found it when it was imported


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    driver = triton.runtime.driver.active
    index = driver.get_current_device() if device.index is None else device.index
    return driver.utils.get_device_properties(index)["max_shared_mem"]


def unit_stride(values: Tensor) -> Tensor:
    """A copy unless elements of the last dimension lie side by side, as kernels assume."""
    return values if values.stride(-1) == 1 or values.shape[-1] == 1 else values.contiguous()


def cdiv(left: int, right: int) -> int:
    """Quotient, rounded up. Triton's own unwraps its arguments for kernels first, which takes the host longer."""
    return -(-left // right)


def next_power_of_2(number: int) -> int:
    """The smallest that is not smaller."""
    return 1 << (number - 1).bit_length()


def precision(dtype: torch.dtype) -> str:
    """The precision of products: of float32 by PyTorch's own setting; other dtypes have one only."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    told = getattr(matmul, "fp32_precision", None)  # from PyTorch 2.9 on; set there, the older setting cannot be read
    return "tf32" if told == "tf32" or (told is None and matmul.allow_tf32) else "ieee"
