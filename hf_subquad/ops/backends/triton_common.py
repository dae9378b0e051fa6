"""Helpers shared by the launchers of Triton kernels."""

import torch
from torch import Tensor


def unit_stride(values: Tensor) -> Tensor:
    """A copy unless elements of the last dimension lie side by side, as kernels assume."""
    return values if values.stride(-1) == 1 or values.shape[-1] == 1 else values.contiguous()


def precision() -> str:
    """The precision of float32 products, following PyTorch's own setting; other dtypes ignore it."""
    matmul = torch.backends.cuda.matmul
    told = getattr(matmul, "fp32_precision", None)  # from PyTorch 2.9 on; set there, the older setting cannot be read
    return "tf32" if told == "tf32" or (told is None and matmul.allow_tf32) else "ieee"
