"""The training loop of Song, Zhang and Zhang (ITCS 2024, arXiv 2112.07628): steps that do not read the m x m weights.

`GaussNewton(WideNet(...), x, y).step()` is the algorithm; `WideNetRegressor` fits and predicts. docs/paper.md says
which pieces are the paper's and which were replaced.
"""

from ..errors import DataError, DivergedError, NotFittedError, StaleStateError
from .gauss_newton import GaussNewton, Step
from .lazy_matrix import LazyMatrix
from .network import WideNet
from .regressor import WideNetRegressor
from .sample_state import MaintainedState
from .solvers import ExactGram, SketchedCG
from .tensor_sketches import CountSketch, TensorSketch, TensorSRHT

__all__ = [
    "CountSketch",
    "DataError",
    "DivergedError",
    "ExactGram",
    "GaussNewton",
    "LazyMatrix",
    "MaintainedState",
    "NotFittedError",
    "SketchedCG",
    "StaleStateError",
    "Step",
    "TensorSRHT",
    "TensorSketch",
    "WideNet",
    "WideNetRegressor",
]
