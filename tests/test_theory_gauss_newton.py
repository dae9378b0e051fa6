"""Is the maintained, lazy, low-rank Gauss-Newton loop the dense one, step by step?"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hf_subquad import ConfigError
from hf_subquad.theory import (
    DataError,
    DivergedError,
    ExactGram,
    GaussNewton,
    SketchedCG,
    StaleStateError,
    TensorSketch,
    TensorSRHT,
    WideNet,
)
from hf_subquad.theory.solvers import gram, gram_diagonal, gram_product

F64 = torch.float64
IN, WIDTH, SAMPLES = 5, 96, 7
DAMPING = 1e-4


def problem(samples: int = SAMPLES, outputs: int = 1, seed: int = 0, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Samples of length 1 and targets of order 1."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(samples, IN, generator=draw, dtype=dtype))
    return x, torch.randn(samples, outputs, generator=draw, dtype=dtype)


def net(outputs: int = 1, depth: int = 2, width: int = WIDTH, **settings: object) -> WideNet:
    return WideNet(IN, width, depth, outputs, seed=1, **{"dtype": F64, **settings})


class Iterate(NamedTuple):
    weight: Tensor
    predictions: Tensor
    fired: Tensor


def dense_gauss_newton(network: WideNet, x: Tensor, y: Tensor) -> Iterator[Iterate]:
    """The textbook method: the whole Jacobian by autograd, the whole matrix updated. Yields what each step leaves."""
    weight = network.trained.rows(torch.arange(network.width)).detach().clone()
    h = network.features(x)

    def predict(weight: Tensor) -> Tensor:
        return (network.gain * torch.relu(h @ weight - network.shift(h))) @ network.output.t()

    while True:
        jacobian = torch.autograd.functional.jacobian(predict, weight).flatten(2).flatten(0, 1)
        matrix = jacobian @ jacobian.t()
        matrix += DAMPING * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=F64)
        z = torch.linalg.solve(matrix, (predict(weight) - y).flatten())
        weight = weight - (jacobian.t() @ z).view_as(weight)
        yield Iterate(weight, predict(weight), h @ weight > network.shift(h))


def assert_same_trajectory(
    network: WideNet, x: Tensor, y: Tensor, solver: object, steps: int = 6, rtol: float = 1e-9
) -> None:
    reference = dense_gauss_newton(network, x, y)
    optimizer = GaussNewton(network, x, y, solver, DAMPING)
    start = optimizer.state.fired
    for _, expected in zip(range(steps), reference, strict=False):
        optimizer.step()
        assert torch.equal(optimizer.state.fired, expected.fired)
        torch.testing.assert_close(optimizer.state.predictions(), expected.predictions, rtol=0, atol=rtol)
        torch.testing.assert_close(network.trained.rows(torch.arange(WIDTH)), expected.weight, rtol=0, atol=rtol)
        torch.testing.assert_close(network(x), expected.predictions, rtol=0, atol=rtol)
    assert not torch.equal(optimizer.state.fired, start)  # fired sets did change on the way


@pytest.mark.parametrize(("outputs", "depth"), [(1, 2), (1, 3), (3, 2)])
def test_trajectory_is_dense_gauss_newtons(outputs: int, depth: int) -> None:
    assert_same_trajectory(net(outputs, depth), *problem(outputs=outputs), "cholesky")


@pytest.mark.parametrize("solver", [TensorSketch, TensorSRHT])
@pytest.mark.parametrize("outputs", [1, 2])
def test_sketched_solvers_follow_it_to_their_tolerance(solver: type, outputs: int) -> None:
    exact = SketchedCG(solver, DAMPING, tolerance=1e-13)
    assert_same_trajectory(net(outputs), *problem(outputs=outputs), exact, rtol=1e-8)


def test_trajectory_is_the_same_when_every_step_is_merged() -> None:
    network = net(rank_budget=3)
    assert_same_trajectory(network, *problem(), "cholesky")
    assert network.trained.merges == 6


def test_weights_are_not_read_after_the_first_pass() -> None:
    network, plain = net(), net()
    mine, theirs = (GaussNewton(some, *problem()) for some in (network, plain))
    with torch.no_grad():
        network.trained.weight.fill_(torch.nan)
    for _ in range(4):
        assert mine.step().loss == theirs.step().loss
    assert torch.equal(mine.state.margins, theirs.state.margins)


def test_batches_of_new_samples_wait_as_factors_until_the_budget_is_spent() -> None:
    network, dense = net(rank_budget=2 * SAMPLES), net()
    merges = []
    for seed in range(5):
        x, y = problem(seed=seed)
        optimizer, reference = GaussNewton(network, x, y, damping=DAMPING), dense_gauss_newton(dense, x, y)
        for _ in range(3):
            optimizer.step()
            weight = next(reference).weight
        with torch.no_grad():
            dense.trained.weight.copy_(weight)
        merges.append(network.trained.merges)
        torch.testing.assert_close(network.trained.rows(torch.arange(WIDTH)), weight, rtol=0, atol=1e-9)
    assert merges == [0, 0, 1, 1, 2]


def test_loss_at_least_halves_until_a_millionth() -> None:
    x, y = problem(samples=32)
    optimizer = GaussNewton(net(width=2048), x, y)
    losses = [optimizer.step().loss]
    while losses[-1] > 1e-6 * losses[0]:
        losses.append(optimizer.step().loss)
        assert losses[-1] <= losses[-2] / 2
    assert len(losses) < 8


def test_float32_comes_to_the_same_fit() -> None:
    x, y = problem(samples=32)
    single, double = (
        GaussNewton(net(width=1024, dtype=dtype), x.to(dtype), y.to(dtype)) for dtype in (torch.float32, F64)
    )
    for _ in range(6):
        single.step()
        double.step()
    assert max(single.loss(), double.loss()) < 1e-9
    torch.testing.assert_close(single.network(x.float()), y.float(), rtol=0, atol=1e-4)


def test_a_step_reports_what_was_before_it() -> None:
    network = net()
    x, y = problem()
    optimizer = GaussNewton(network, x, y)
    expected = (network(x) - y).square().sum().item() / 2
    h = network.features(x)
    fired = (network.trained.apply_to(h) > network.shift(h)).double().mean().item()
    step = optimizer.step()
    assert step.loss == pytest.approx(expected) and step.fired_share == pytest.approx(fired)
    assert list(step.seconds) == ["forward", "solve", "update", "maintenance"]
    assert optimizer.loss() == pytest.approx((network(x) - y).square().sum().item() / 2)


def test_gram_matrix_is_that_of_the_jacobian() -> None:
    network, (x, y) = net(outputs=2), problem(outputs=2)
    state = GaussNewton(network, x, y).state
    h, weight = network.features(x), network.trained.weight.detach()
    jacobian = torch.autograd.functional.jacobian(
        lambda w: network.gain * torch.relu(h @ w - network.shift(h)) @ network.output.t(), weight
    ).flatten(2).flatten(0, 1)  # fmt: skip
    exact = jacobian @ jacobian.t()
    torch.testing.assert_close(gram(state), exact)
    torch.testing.assert_close(gram_diagonal(state).flatten(), exact.diagonal())
    v = torch.randn(SAMPLES, 2, dtype=F64)
    torch.testing.assert_close(gram_product(state, v).flatten(), exact @ v.flatten())


def test_equal_samples_with_other_targets_get_the_mean() -> None:
    x, y = problem()
    x, y = torch.cat([x, x]), torch.cat([y, y + 1])
    network = net(width=1024)
    optimizer = GaussNewton(network, x, y)
    for _ in range(8):
        optimizer.step()
    torch.testing.assert_close(network(x), torch.cat([y[:SAMPLES] + 0.5] * 2), rtol=0, atol=1e-6)


def test_preconditioned_conjugate_gradients_take_few_iterations() -> None:
    """Beside n = 48 for exact arithmetic without a preconditioner, on a Gram matrix of clustered samples."""
    x, y = problem(samples=48)
    x = torch.nn.functional.normalize(x[:6].repeat(8, 1) + 0.05 * x)
    state = GaussNewton(net(width=512), x, y).state
    solver = SketchedCG(TensorSketch, DAMPING, tolerance=1e-6)
    found = solver.solve(state, y)
    torch.testing.assert_close(
        found, ExactGram(DAMPING).solve(state, y), rtol=1e-3, atol=1e-3 * found.abs().max().item()
    )
    assert solver.used <= 24
    repeated = SketchedCG(TensorSketch, DAMPING, tolerance=1e-6)
    assert torch.equal(repeated.solve(state, y), found)


@pytest.mark.parametrize("name", ["x", "y"])
def test_values_that_are_not_finite_are_refused(name: str) -> None:
    x, y = problem()
    {"x": x, "y": y}[name][2, 0] = torch.nan
    with pytest.raises(DataError, match=f"{name} holds NaN"):
        GaussNewton(net(), x, y)


def test_shapes_dtypes_and_settings_that_do_not_fit_are_refused() -> None:
    x, y = problem()
    for wrong_x, wrong_y in ((x[:, 1:], y), (x, y[1:]), (x[:0], y[:0]), (x, y[:, 0]), (x, y.repeat(1, 2))):
        with pytest.raises(DataError, match=r"x must be \[n, 5\] and y \[n, 1\]"):
            GaussNewton(net(), wrong_x, wrong_y)
    with pytest.raises(DataError, match=r"x is torch\.float32"):
        GaussNewton(net(), x.float(), y)
    with pytest.raises(ConfigError, match="solver must be one of"):
        GaussNewton(net(), x, y, "newton")
    with pytest.raises(ConfigError, match="damping must be above 0"):
        GaussNewton(net(), x, y, damping=0.0)


def test_a_step_from_infinite_predictions_changes_nothing() -> None:
    x, y = problem()
    network = net()
    optimizer = GaussNewton(network, x, y)
    optimizer.state.set_pre(torch.full_like(optimizer.state.margins, torch.inf))
    with pytest.raises(DivergedError, match="larger damping"):
        optimizer.step()
    assert network.trained.pending_rank == 0


def test_a_matrix_that_others_changed_is_noticed() -> None:
    (x, y), (other_x, other_y) = problem(), problem(seed=1)
    network = net()
    one, two = GaussNewton(network, x, y), GaussNewton(network, other_x, other_y)
    one.step()
    network.state_dict()  # merges, and changes nothing
    one.step()
    with pytest.raises(StaleStateError, match="make a new GaussNewton"):
        two.step()
    GaussNewton(network, other_x, other_y).step()
    network.load_state_dict(net().state_dict())
    with pytest.raises(StaleStateError):
        one.step()


@pytest.mark.parametrize("kind", ["cholesky", "tensor_sketch"])
def test_a_system_that_cannot_be_solved_is_refused(kind: str) -> None:
    network = net()
    nothing = torch.zeros(1, IN, dtype=F64)  # fires no neuron
    optimizer = GaussNewton(network, nothing, torch.ones(1, 1, dtype=F64), kind)
    with pytest.raises(DivergedError, match="not positive definite"):
        optimizer.step()
    assert network.trained.pending_rank == 0
