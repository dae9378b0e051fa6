"""Regression with a very wide net on few samples, with scikit-learn's interface but without depending on it."""

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import ConfigError, DataError, NotFittedError
from .gauss_newton import GaussNewton
from .network import WideNet

_CHUNK = 256  # samples predicted at once
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class WideNetRegressor:
    """A wide net trained by Gauss-Newton to the least squared loss.

    Columns of X are standardised, a constant column with the weight of all others together is appended, and each row is
    scaled to length 1; targets are standardised. The net starts at zero (`zero_start`), so that predictions contain
    only what was learned.

    Args:
        width: m, even. An iteration costs n^2 m multiply-adds; fitting needs memory for m^2 numbers.
        depth: L, hidden layers.
        max_iter: the most Gauss-Newton iterations.
        tol: stop when the loss is at most this share of what it was at first.
        solver: 'cholesky', 'tensor_sketch' or 'tensor_srht'.
        damping: of each step, as a share of the mean diagonal of the Gram matrix. Much larger values with few
            iterations avoid interpolating noisy targets.
        random_state: seed.
        dtype: 'float32' or 'float64'.
        verbose: show a progress bar.

    Attributes:
        network_: the WideNet.
        history_: one dictionary per iteration, as of before its update: loss (sum of squared errors of the standardised
            targets, halved), fired_share, and seconds by part.
        loss_: after the last iteration.
        n_iter_: iterations done.
        initialisation_seconds_: time of the one pass over the network's matrix.
        n_features_in_: columns of X.
    """

    def __init__(
        self,
        width: int = 4096,
        depth: int = 2,
        max_iter: int = 20,
        tol: float = 1e-6,
        solver: str = "cholesky",
        damping: float = 1e-4,
        random_state: int = 0,
        dtype: str = "float32",
        verbose: bool = False,
    ) -> None:
        self.width = width
        self.depth = depth
        self.max_iter = max_iter
        self.tol = tol
        self.solver = solver
        self.damping = damping
        self.random_state = random_state
        self.dtype = dtype
        self.verbose = verbose

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments as they are now."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> "WideNetRegressor":
        """Change some of the constructor's arguments.

        Raises:
            ConfigError: it has no such argument.
        """
        unknown = params.keys() - self.get_params().keys()
        if unknown:
            raise ConfigError(f"unknown parameters {sorted(unknown)}; there are {sorted(self.get_params())}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def fit(self, X: Any, y: Any) -> "WideNetRegressor":
        """Train on samples X [n, d] and targets y [n] or [n, p], array-like. An error leaves what was fitted before.

        Raises:
            DataError: wrong shapes, no samples, or values that are not finite numbers.
            ConfigError: a parameter is out of range.
            DivergedError: training left the finite numbers.
        """
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(map(repr, _DTYPES))}, got {self.dtype!r}")
        if self.max_iter < 1:
            raise ConfigError(f"max_iter must be at least 1, got {self.max_iter}")
        samples, targets = _finite("X", X, (2,)), _finite("y", y, (1, 2))
        if len(samples) != len(targets):
            raise DataError(f"X has {len(samples)} samples, y has {len(targets)}")
        columns = targets.reshape(len(targets), -1)
        x_moments, y_moments = _moments(samples), _moments(columns)
        network = WideNet(
            samples.shape[1] + 1, self.width, self.depth, columns.shape[1], self.random_state,
            zero_start=True, dtype=_DTYPES[self.dtype],
        )  # fmt: skip
        standard = self._tensor((columns - y_moments[0]) / y_moments[1])
        optimizer = GaussNewton(network, self._lifted(samples, *x_moments), standard, self.solver, self.damping)
        history: list[dict[str, Any]] = []
        goal = self.tol * optimizer.loss()
        with tqdm(total=self.max_iter, unit="iteration", disable=not self.verbose) as bar:
            while len(history) < self.max_iter and optimizer.loss() > goal:
                step = optimizer.step()
                history.append({"loss": step.loss, "fired_share": step.fired_share, "seconds": step.seconds})
                bar.update()
                bar.set_postfix(loss=f"{step.loss:.2e}", fired=f"{step.fired_share:.1%}")
        self.network_, self.history_, self.loss_ = network, history, optimizer.loss()
        self.n_iter_, self.n_features_in_ = len(history), samples.shape[1]
        self.initialisation_seconds_ = optimizer.seconds
        self._x_moments, self._y_moments, self._one_target = x_moments, y_moments, targets.ndim == 1
        return self

    @torch.no_grad()
    def predict(self, X: Any) -> np.ndarray:
        """Targets [N] or [N, p] of samples X [N, d], exact evaluations of the trained net.

        Raises:
            NotFittedError: `fit` was not called.
            DataError: X has another number of columns than in `fit`, or values that are not finite numbers.
        """
        if not hasattr(self, "network_"):
            raise NotFittedError("this WideNetRegressor is not fitted yet: call fit(X, y) first")
        samples = _finite("X", X, (2,))
        if samples.shape[1] != self.n_features_in_:
            raise DataError(f"X has {samples.shape[1]} columns, fit saw {self.n_features_in_}")
        chunks = [self.network_(chunk) for chunk in self._lifted(samples, *self._x_moments).split(_CHUNK)]
        mean, scale = self._y_moments
        found = torch.cat(chunks).double().numpy() * scale + mean
        return found[:, 0] if self._one_target else found

    def score(self, X: Any, y: Any) -> float:
        """R^2: 1 minus squared error over variance, averaged over the targets."""
        truth = _finite("y", y, (1, 2))
        found = self.predict(X)
        if truth.shape != found.shape:
            raise DataError(f"y must be {list(found.shape)}, got {list(truth.shape)}")
        missed = ((truth - found) ** 2).sum(0)
        return float(np.mean(1 - missed / ((truth - truth.mean(0)) ** 2).sum(0)))

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn asks of an estimator; called by scikit-learn only."""
        from sklearn.utils import RegressorTags, Tags, TargetTags

        return Tags(
            estimator_type="regressor",
            target_tags=TargetTags(required=True, multi_output=True),
            regressor_tags=RegressorTags(),
        )

    def _lifted(self, samples: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> Tensor:
        """Standardised samples [n, d] on the unit sphere of one dimension more, where none of them meet."""
        standard = (samples - mean) / scale
        constant = np.full((len(samples), 1), samples.shape[1] ** 0.5)
        lifted = np.concatenate([standard, constant], 1)
        return self._tensor(lifted / np.linalg.norm(lifted, axis=1, keepdims=True))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(_DTYPES[self.dtype])


def _finite(name: str, values: Any, dimensions: tuple[int, ...]) -> np.ndarray:
    """float64 array with at least one sample."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must be an array of numbers: {error}") from error
    if array.ndim not in dimensions or array.size == 0:
        wanted = " or ".join(f"{count}-dimensional" for count in dimensions)
        raise DataError(f"{name} must be {wanted} and not empty, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise DataError(f"{name} holds NaN or infinite values: remove or impute those samples")
    return array


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of columns, 1 where a column is constant."""
    deviation = values.std(0)
    return values.mean(0), np.where(deviation > 0, deviation, 1.0)
