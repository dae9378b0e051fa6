"""Gauss-Newton on the trained matrix of a wide net: forward, solve, update and maintenance, none of them m x m."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError, DivergedError, StaleStateError
from .network import WideNet
from .sample_state import MaintainedState
from .solvers import Solver, make_solver


@dataclass(frozen=True)
class Step:
    """One iteration, described as it was before its update.

    Attributes:
        loss: ||f - y||^2 / 2.
        fired_share: mean share of the m neurons that fired.
        seconds: by part: forward, solve, update, maintenance.
    """

    loss: float
    fired_share: float
    seconds: dict[str, float]


class GaussNewton:
    """Trains the matrix W of a network on fixed samples: W -= D^T H with D = diag(z) B and (G + damping I) z = f - y.

    That is a full Gauss-Newton (Levenberg-Marquardt) step of all m^2 entries of W: the step lies in the span of the
    Jacobian's n rows. Creating the optimizer costs the one pass over W; an iteration does not read W.

    Args:
        network: its `trained` matrix is trained, in place and lazily.
        x: samples [n, d] in the dtype of the network.
        y: targets [n, p].
        solver: 'cholesky', 'tensor_sketch', 'tensor_srht', or an object with a method `solve`.
        damping: as a share of the mean diagonal of G; ignored if `solver` is an object.

    Attributes:
        state: pre-activations and fired sets.
        seconds: the time that creating it took.

    Raises:
        DataError: shapes or values of x or y do not fit.
        ConfigError: unknown solver or damping.
    """

    @torch.no_grad()
    def __init__(
        self, network: WideNet, x: Tensor, y: Tensor, solver: str | Solver = "cholesky", damping: float = 1e-4
    ) -> None:
        _check(network, x, y)
        self.solver = make_solver(solver, damping) if isinstance(solver, str) else solver
        started = time.perf_counter()
        self.network, self.y = network, y
        self.state = MaintainedState(network, x)
        self._left = -self.state.features.t()
        self._seen = network.trained.changes
        self.seconds = time.perf_counter() - started

    @torch.no_grad()
    def step(self) -> Step:
        """One iteration.

        Raises:
            DivergedError: predictions are not finite, or the solve failed; the network is as before the call.
            StaleStateError: something else has changed the matrix, such as an optimizer for other samples.
        """
        clock = _Clock(self.y.device)
        residual = self._forward() - self.y
        loss, share = residual.double().square().sum().item() / 2, self.state.fired_share
        if not loss < float("inf"):
            raise DivergedError(f"the loss is {loss}: use a larger damping, or float64")
        clock.stop("forward")
        direction = self.state.direction(self.solver.solve(self.state, residual))
        clock.stop("solve")
        self._update(direction)
        clock.stop("update")
        self._maintain(direction)
        clock.stop("maintenance")
        return Step(loss, share, clock.seconds)

    def _forward(self) -> Tensor:
        """Predictions [n, p]."""
        if self._seen != self.network.trained.changes:
            raise StaleStateError("something else changed the trained matrix: make a new GaussNewton for these samples")
        return self.state.predictions()

    def _update(self, direction: Tensor) -> None:
        """Update what the next iteration needs, for W -= D^T H."""
        self.state.move(direction)

    def _maintain(self, direction: Tensor) -> None:
        """Store the step itself, for later reads of W."""
        self.network.trained.append(self._left, direction)
        self._seen = self.network.trained.changes

    @torch.no_grad()
    def loss(self) -> float:
        """||f - y||^2 / 2 as it is now."""
        return (self.state.predictions() - self.y).double().square().sum().item() / 2


class _Clock:
    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._last = time.perf_counter()

    def stop(self, part: str) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.seconds[part], self._last = now - self._last, now


def _check(network: WideNet, x: Tensor, y: Tensor) -> None:
    width, outputs = network.in_features, len(network.output)
    if x.ndim != 2 or len(x) == 0 or x.shape[1] != width or y.shape != (len(x), outputs):
        raise DataError(
            f"x must be [n, {width}] and y [n, {outputs}] with n >= 1, got {list(x.shape)} and {list(y.shape)}"
        )
    for name, values in (("x", x), ("y", y)):
        if values.dtype != network.output.dtype:
            raise DataError(f"{name} is {values.dtype}, the network {network.output.dtype}: convert one of them")
        if not values.isfinite().all():
            raise DataError(f"{name} holds NaN or infinite values: remove those samples")
