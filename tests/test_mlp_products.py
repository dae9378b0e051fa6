"""Do mixtures of parts, each with neurons of its own, compute what a masked dense MLP computes, with all gradients?"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from unittest import mock

import pytest
import torch
from helpers.mlps import KINDS, Kind, leaves_of, patched, reference
from helpers.reference import mask_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_subquad import dense_forward
from hf_subquad.layers.budget import Budget
from hf_subquad.layers.sparse_mlp import SparseMLP
from hf_subquad.ops.group_tokens import Selection, make_tiles
from hf_subquad.ops.mlp_products import Part
from hf_subquad.ops.row_sampling import keep_probabilities, row_norms, sampled_weights

D, M, N = 5, 11, 23
DRAW = 11  # seed of the rows that are sampled


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiled(rows: Tensor | None, tokens: int, k: int, tile_size: int, neurons: int = M) -> Part:
    """A part in tiles of random content, with k random neurons each."""
    generator = torch.Generator().manual_seed(13 + k)
    tiles = make_tiles(torch.randn(tokens, 6, generator=generator), tile_size, "similar")
    chosen = [torch.randperm(neurons, generator=generator)[:k].sort().values for _ in range(tiles.shape[0])]
    return Part(rows, tokens, Selection(tiles, torch.stack(chosen)))


def dense(rows: Tensor) -> Part:
    return Part(rows, len(rows))


def idle(rows: Tensor) -> Part:
    return Part(rows, len(rows), idle=True)


def few(k: int, tile_size: int) -> Callable[[Tensor], Part]:
    return lambda rows: tiled(rows, len(rows), k, tile_size)


# Sizes of the classes, in tokens, and how each is computed; tokens beyond them are in no part.
MIXTURES: dict[str, list[tuple[int, Callable[[Tensor], Part]]]] = {
    "two k": [(9, few(4, 4)), (14, few(7, 3))],
    "two k, some in none": [(9, few(4, 4)), (7, few(7, 3))],
    "dense and k": [(10, dense), (13, few(3, 4))],
    "k and dense, some in none": [(10, few(3, 4)), (6, dense)],
    "dense and idle": [(12, dense), (11, idle)],
    "idle, k, dense": [(5, idle), (11, few(6, 4)), (4, dense)],
    "one token dense": [(1, dense), (22, few(5, 8))],
    "one token of k": [(22, dense), (1, few(5, 8))],
    "an empty class": [(0, dense), (0, idle), (17, few(5, 4))],
    "dense, some in none": [(15, dense)],
    "all idle": [(23, idle)],
    "three k": [(3, few(1, 2)), (8, few(11, 4)), (9, few(2, 2))],
}


def mixture(name: str) -> list[Part]:
    """Its classes hold random tokens, in no order."""
    order, parts = torch.randperm(N, generator=torch.Generator().manual_seed(5)), []
    for size, part in MIXTURES[name]:
        parts.append(part(order[:size]))
        order = order[size:]
    return parts


def mask_of_parts(parts: Sequence[Part], tokens: int, neurons: int) -> tuple[Tensor, Tensor]:
    """[N, m], 1 where a neuron is computed for a token; and bool [N], whether a token is in a part."""
    mask, held = torch.zeros(tokens, neurons, dtype=torch.float64), torch.zeros(tokens, dtype=torch.bool)
    for part in parts:
        rows = torch.arange(tokens) if part.rows is None else part.rows
        assert not held[rows].any() and len(rows) == part.tokens
        held[rows] = True
        if not part.idle:
            mask[rows] = 1.0 if part.selection is None else mask_of(part.selection, neurons, torch.float64)
    return mask, held


def passing(parts: Sequence[Part], gradient: Tensor, share: float, neurons: int = M) -> Tensor:
    """[N]: the weights of sampled rows, and 1 in all of a part whose products would cost no less for fewer rows: those
    of a tile are its k neurons times all of its rows, those of some rows are all m neurons times these."""
    torch.manual_seed(DRAW)
    weights = keep_probabilities(row_norms(gradient), share)
    for part in parts:
        rows = slice(None) if part.rows is None else part.rows
        if not part.idle and weights[rows].sum() * neurons >= 0.9 * part.size(neurons):
            weights[rows] = 1
        elif not part.idle and share < 1:
            weights[rows] = sampled_weights(weights[rows])
    return weights


def factors(mlp: SparseMLP) -> list[Tensor]:
    return [factor for p in mlp.projections for factor in (p.update.U, p.update.V)]


def run(module: nn.Module, mlp: SparseMLP, parts: Sequence[Part], x: Tensor, upstream: Tensor, share: float = 1.0):
    """Output, then the gradients of x and of every U and V."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    with mlp.using(Budget(gradient=share), selection=parts):
        y = module(x)
    torch.manual_seed(DRAW)
    y.backward(upstream.to(y.dtype))
    return [y.detach(), x.grad, *(factor.grad.clone() for factor in factors(mlp))]


def run_twin(twin: nn.Module, mlp: SparseMLP, parts: Sequence[Part], x: Tensor, upstream: Tensor, share: float = 1.0):
    """The same by stock operations in the dtype of x."""
    x = x.detach().requires_grad_()
    mask, held = mask_of_parts(parts, len(x), mlp.index.neurons)
    leaves = leaves_of(mlp, torch.promote_types(x.dtype, torch.float32))
    y = reference(twin.to(x.dtype), mlp, x, mask, leaves, passing(parts, upstream.double(), share, mlp.index.neurons))
    y = y * held.unsqueeze(1)
    y.backward(upstream.to(y.dtype))
    return [y.detach(), x.grad, *(leaf.grad for pair in leaves for leaf in pair)]


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12, name: str = "") -> None:
    """To rounding in float64: sums of at most 23 products of values of about one."""
    assert len(found) == len(expected) >= 6
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one.to(other.dtype), other, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}"
        )


@pytest.mark.parametrize(("kind", "bias"), list(zip(KINDS, (True, False, True, True), strict=True)))
def test_equals_the_masked_dense_twin(kind: Kind, bias: bool) -> None:
    """Rows that pass no gradients count for U and V of the output projection, and for nothing before it."""
    module, mlp, twin = patched(kind, D, M, bias)
    x, upstream, dropped = random(N, D), random(N, D, seed=2), 0
    for name, share in itertools.product(MIXTURES, (1.0, 0.8, 0.3)):
        parts = mixture(name)
        expected = run_twin(twin, mlp, parts, x, upstream, share)
        assert_equal(run(module, mlp, parts, x, upstream, share), expected, name=f"{name}, {share}")
        computed = mask_of_parts(parts, N, M)[0].any(1)
        if (computed & (passing(parts, upstream, share) == 0)).any():
            exact = run_twin(twin, mlp, parts, x, upstream)
            assert (exact[1] - expected[1]).abs().max() > 1e-3
            assert torch.equal(exact[-1], expected[-1]) and torch.equal(exact[-2], expected[-2])
            dropped += 1
    assert dropped >= len(MIXTURES)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: Kind) -> None:
    module, mlp, _ = patched(kind, D, M)
    parts = mixture("idle, k, dense")

    def sparse(x: Tensor, *_: Tensor) -> Tensor:
        with mlp.using(selection=parts):
            return module(x)

    assert torch.autograd.gradcheck(sparse, (random(N, D).requires_grad_(), *factors(mlp)), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_in_no_part(kind: Kind) -> None:
    """Their output and the gradient that they pass back are zero, whatever they hold."""
    module, mlp, _ = patched(kind, D, M)
    parts = mixture("two k, some in none")
    _, held = mask_of_parts(parts, N, M)
    x, upstream = random(N, D), random(N, D, seed=2)
    y, grad_x, *rest = run(module, mlp, parts, x, upstream)
    assert 0 < (~held).sum() < N
    assert not y[~held].any() and not grad_x[~held].any() and y[held].all() and grad_x[held].all()
    x[~held], upstream[~held] = float("nan"), 1e30
    again = run(module, mlp, parts, x, upstream)
    assert all(torch.equal(one, other) for one, other in zip([y, grad_x, *rest], again, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_tokens(kind: Kind) -> None:
    module, mlp, _ = patched(kind, D, M)
    parts, x, upstream = mixture("idle, k, dense"), random(N, D), random(N, D, seed=2)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(8))
    place = order.argsort()
    moved = [replace(part, rows=place[part.rows]) for part in parts]
    y, grad_x, *rest = run(module, mlp, parts, x, upstream)
    assert_equal(run(module, mlp, moved, x[order], upstream[order]), [y[order], grad_x[order], *rest])


@pytest.mark.parametrize("parts", ["dense", "k = m", "dense and k = m"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_neurons_are_the_dense_model(kind: Kind, parts: str) -> None:
    module, mlp, _ = patched(kind, D, M)
    order = torch.randperm(N)
    chosen = {
        "dense": [Part(None, N)],
        "k = m": [tiled(None, N, M, 4)],
        "dense and k = m": [dense(order[:9]), tiled(order[9:], N - 9, M, 4)],
    }[parts]
    x, upstream = random(N, D), random(N, D, seed=2)
    leaf = x.clone().requires_grad_()
    with dense_forward(module):
        y = module(leaf)
    y.backward(upstream)
    expected = [y.detach(), leaf.grad, *(factor.grad.clone() for factor in factors(mlp))]
    assert_equal(run(module, mlp, chosen, x, upstream), expected)


@pytest.mark.parametrize("name", ["dense, some in none", "dense and k", "two k", "idle, k, dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_gradient_cost_nothing(kind: Kind, name: str) -> None:
    """What an output gradient of zeros leaves out is left out exactly, and its products are not computed."""
    module, mlp, twin = patched(kind, D, M)
    parts, x, upstream = mixture(name), random(N, D), random(N, D, seed=2)
    sparse = upstream * (torch.arange(N) % 6 == 0).unsqueeze(1)
    assert_equal(run(module, mlp, parts, x, sparse), run_twin(twin, mlp, parts, x, sparse))

    def backward_flops(gradient: Tensor) -> int:
        with mlp.using(selection=parts):
            y = module(x.clone().requires_grad_())
        with FlopCounterMode(display=False) as counter:
            y.backward(gradient)
        return counter.get_total_flops()

    assert backward_flops(sparse) < 0.8 * backward_flops(upstream)


def test_a_gradient_of_zeros() -> None:
    """As a batch without any label has: all gradients are zero, and none is missing."""
    module, mlp, _ = patched("gated", D, M)
    for name in MIXTURES:
        for share in (1.0, 0.5):
            _, *gradients = run(module, mlp, mixture(name), random(N, D), torch.zeros(N, D), share)
            assert all(not gradient.any() for gradient in gradients)


def test_upstream_gradient_with_strange_strides() -> None:
    """sum() hands down an expanded scalar."""
    module, mlp, twin = patched("stacked", D, M)
    parts, ones = mixture("idle, k, dense"), torch.ones(1, 1, dtype=torch.float64).expand(N, D)
    assert_equal(run(module, mlp, parts, random(N, D), ones), run_twin(twin, mlp, parts, random(N, D), ones))


@pytest.mark.parametrize(
    "parts",
    [[tiled(None, 12, 4, 4)], [dense(torch.arange(4)), tiled(torch.arange(4, 12), 8, 4, 4)]],
    ids=["all tokens in tiles", "two parts"],
)
@pytest.mark.parametrize("kind", ["plain", "gated", "conv1d"])
def test_batch_shape_and_inplace_middle(kind: Kind, parts: list[Part]) -> None:
    """As with `nn.ReLU(inplace=True)` between the projections, and a residual added onto the output."""
    found = []
    for inplace in (False, True):
        module, mlp, _ = patched(kind, D, M, activation=nn.ReLU(inplace))
        x = random(12, D).view(2, 3, 2, D).requires_grad_()
        with mlp.using(selection=parts):
            y = module(x)
        assert y.shape == (2, 3, 2, D)
        y = y.mul_(3) if inplace else y * 3
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(factor.grad for factor in factors(mlp))])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# In other dtypes, and by other backends


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_error_is_at_most_three_times_the_stock_one(kind: Kind, dtype: torch.dtype, share: float) -> None:
    d, m, tokens = 48, 160, 90
    module, mlp, twin = patched(kind, d, m, dtype=dtype)
    with torch.no_grad():  # the same, representable values on all sides: only the arithmetic differs
        for factor in factors(mlp):
            factor.copy_(factor.to(dtype))
    order = torch.randperm(tokens)
    parts = [dense(order[:40]), tiled(order[40:70], 30, 40, 12, m), idle(order[70:80])]
    x, upstream = random(tokens, d).to(dtype), random(tokens, d, seed=2).to(dtype)
    ours = run(module, mlp, parts, x, upstream, share)
    stock = run_twin(twin, mlp, parts, x, upstream, share)
    exact = run_twin(twin, mlp, parts, x.double(), upstream.double(), share)
    assert ours[0].dtype == dtype and all(gradient.dtype == torch.float32 for gradient in ours[2:])
    for one, other, truth in zip(ours, stock, exact, strict=True):
        error, stock_error = ((value.double() - truth).norm() / truth.norm() for value in (one, other))
        assert 0 < error <= 3 * stock_error < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_computes_in_its_dtype(kind: Kind) -> None:
    module, mlp, twin = patched(kind, D, M, dtype=torch.float32)
    parts, x, upstream = mixture("idle, k, dense"), random(N, D).float(), random(N, D, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(module, mlp, parts, x, upstream)
    assert (found[0].dtype, *(gradient.dtype for gradient in found[1:])) == (
        torch.bfloat16, *(torch.float32,) * (len(found) - 1),
    )  # fmt: skip
    # A handful of roundings of bfloat16, through two projections, on values of about one.
    expected = run_twin(twin, mlp, parts, x.double(), upstream)
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() <= 8 * torch.finfo(torch.bfloat16).eps * other.norm()


@pytest.mark.parametrize(
    ("kind", "name", "share"),
    [
        ("plain", "two k", 1.0),
        ("gated", "one token of k", 0.6),
        ("stacked", "idle, k, dense", 0.5),
        ("conv1d", "idle, k, dense", 1.0),
    ],
)
def test_triton_computes_the_same(kind: Kind, name: str, share: float) -> None:
    pytest.importorskip("triton", minversion="3.3")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here: run -m gpu")
    module, mlp, twin = patched(kind, D, M, dtype=torch.float32, backend="triton")
    x, upstream, parts = random(N, D).float(), random(N, D, seed=2), mixture(name)
    expected = run_twin(twin, mlp, parts, x.double(), upstream, share)
    assert_equal(run(module, mlp, parts, x, upstream, share), expected, 1e-4)  # float32 sums of at most 23 products


def test_weights_may_leave_the_range_of_half_precision() -> None:
    """A row that is kept with a probability of 1 / 10^6 gets the weight 10^6, and the product has the norm of a large
    row."""
    module, mlp, _ = patched("plain", D, M, dtype=torch.float16)
    upstream = torch.full((400, D), 1e-6, dtype=torch.float16)
    upstream[:60] = 1.0
    parts, x = [dense(torch.arange(400))], random(400, D).half().requires_grad_()
    probability = keep_probabilities(row_norms(upstream), 0.9)
    offset = 1 - probability[:60].sum() % 1 - probability[60:].sum() / 2  # the next integer lies among the small rows
    with mlp.using(Budget(gradient=0.9), selection=parts):
        y = module(x)
    with mock.patch("torch.rand", lambda *shape, device: offset.to(device)):
        assert sampled_weights(probability)[60:].max() > torch.finfo(torch.float16).max
        y.backward(upstream)
    assert x.grad is not None and x.grad.isfinite().all()


def test_the_expected_gradient_is_the_whole_one() -> None:
    """Also where about as many rows are expected to pass as make a part pass as a whole."""
    module, mlp, _ = patched("gated", D, M)
    x, upstream, parts = random(N, D), random(N, D, seed=2), [dense(torch.arange(N))]
    exact = run(module, mlp, parts, x, upstream)
    for share in (0.3, 0.9, 0.97):
        torch.manual_seed(0)
        total, draws = torch.zeros_like(exact[1]), 600
        leaf = x.clone().requires_grad_()
        with mlp.using(Budget(gradient=share), selection=parts):
            for _ in range(draws):
                module(leaf).backward(upstream)
        total = leaf.grad / draws
        error = float((total - exact[1]).norm() / exact[1].norm())
        # One draw's error is about sqrt(1 - share); systematic sampling and the MLP's shape change it by little.
        assert error <= 4 * ((1 - share) / draws) ** 0.5
