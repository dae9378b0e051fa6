"""Regression tasks for wide nets whose loss can be brought to zero."""

import torch
from torch import Tensor

from hf_subquad.theory import WideNet


def smooth_task(samples: int, features: int = 16, seed: int = 1) -> tuple[Tensor, Tensor]:
    """x [n, d] of length 1, drawn uniformly, and standardised values y [n, 1] of sin(3 x_1) + x_2 x_3.

    With fewer samples than fired neurons some weights fit them all.
    """
    draw = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(samples, features, generator=draw))
    y = torch.sin(3 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    return x, (y - y.mean()) / y.std()


def teacher_task(samples: int, features: int = 16, seed: int = 1) -> tuple[Tensor, Tensor]:
    """The same samples; values y [n, 1] are another wide net's, standardised."""
    x, _ = smooth_task(samples, features, seed)
    with torch.no_grad():
        y = WideNet(features, 2048, seed=seed + 1000)(x)
    return x, (y - y.mean()) / y.std()


TASKS = {"teacher": teacher_task, "smooth": smooth_task}
