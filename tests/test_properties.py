"""Whatever the shapes, settings and dtype: is the sparse MLP the masked dense one, and does what should not matter not?

Every example is a small model around one patched MLP; its own index chooses. No example depends on chance: the
examples are the same in every run.
"""

from dataclasses import asdict, dataclass, replace

import pytest
import torch
from helpers.mlps import KINDS, Kind, leaves_of, patched, reference
from helpers.reference import mask_of, recorded_selections
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hf_subquad import dense_forward, sparse_forward, sync_model, unpatch_model
from hf_subquad.layers.sparse_mlp import SparseMLP
from hf_subquad.ops.group_tokens import Selection
from hf_subquad.ops.mlp_products import Part
from hf_subquad.patching.mlp_patterns import find_activations, find_mlps

ACTIVATIONS = ("relu", "gelu", "silu", "quick_gelu", "gelu_new", "relu2", "tanh", "prelu")  # the last one is trained
ORDERS = ("similar", "consecutive")


@dataclass(frozen=True)
class Case:
    kind: Kind
    activation: str
    bias: bool
    d: int
    m: int
    tokens: int
    k: int
    tile_size: int
    tile_order: str
    rank: int
    alpha: float
    sketch_rank: int

    def made(self, dtype: torch.dtype = torch.float64, **more: int) -> tuple[nn.Module, SparseMLP, nn.Module]:
        """As `patched` does, by this case."""
        activation = nn.PReLU() if self.activation == "prelu" else ACT2FN[self.activation]
        values = asdict(self) | {"active": self.k, "activation": activation, "dtype": dtype} | more
        return patched(**{name: value for name, value in values.items() if name not in ("tokens", "k")})

    def x(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return random(self.tokens, self.d).to(dtype)


@st.composite
def cases(draw: st.DrawFn, least: int = 1, **fixed: object) -> Case:
    d, tokens = draw(st.integers(least, 9)), draw(st.integers(least, 40))
    m = d + draw(st.integers(1, 14))
    values = {
        "kind": draw(st.sampled_from(KINDS)), "activation": draw(st.sampled_from(ACTIVATIONS)),
        "bias": draw(st.booleans()), "d": d, "m": m, "tokens": tokens, "k": draw(st.integers(1, m)),
        "tile_size": draw(st.integers(1, 48)), "tile_order": draw(st.sampled_from(ORDERS)),
        "rank": draw(st.integers(1, min(d, m))), "alpha": draw(st.floats(0.1, 32)),
        "sketch_rank": draw(st.integers(1, 12)),
    }  # fmt: skip
    return Case(**values | fixed)


def examples(count: int):
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Around(nn.Module):
    """The rest of a model: what comes before and after, and a residual path."""

    def __init__(self, d: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(3, d), nn.Linear(d, 2)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(random(*parameter.shape, seed=20 + number))
        self.to(dtype)

    def forward(self, x: Tensor, mlp) -> Tensor:
        hidden = self.before(x).tanh()
        return self.after(hidden + mlp(hidden))


def run(
    case: Case, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], list[Selection]]:
    """Output and all gradients: of the patched model, of the masked dense one in `dtype`, and of that in float64."""
    module, mlp, twin = case.made(dtype)
    x, upstream = random(case.tokens, 3).to(dtype), random(case.tokens, 2, seed=2).to(dtype)

    def results(around: Around, x: Tensor, run_mlp, middle: nn.Module, factors: list[Tensor]) -> dict[str, Tensor]:
        """`middle` is what is trained between the projections."""
        x = x.clone().requires_grad_()
        middle.zero_grad()
        y = around(x, run_mlp)
        y.backward(upstream.to(y.dtype))
        grads = {"x": x.grad, **{n: p.grad.clone() for part in (around, middle) for n, p in part.named_parameters()}}
        return {"y": y.detach()} | grads | {f"factor {n}": factor.grad for n, factor in enumerate(factors)}

    around = Around(case.d, dtype)
    with recorded_selections() as made:
        own = [factor for p in mlp.projections for factor in (p.update.U, p.update.V)]
        sparse = results(around, x, module, mlp.index.activation, own)
    assert len(made) == mlp.calls == (case.k < case.m)  # all of them need no choice
    mask = mask_of(made[0], case.m, torch.float64) if made else torch.ones(case.tokens, case.m)

    def masked(dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = leaves_of(mlp, torch.promote_types(dtype, torch.float32))
        plain = Around(case.d, torch.float64)
        plain.load_state_dict(around.state_dict())
        dense = twin.to(dtype)
        factors = [factor for pair in leaves for factor in pair]
        middle = find_activations(find_mlps(dense, mlp.runtime.config)[0])[0]
        return results(plain.to(dtype), x.to(dtype), lambda h: reference(dense, mlp, h, mask, leaves), middle, factors)

    stock = masked(dtype)
    return sparse, stock, masked(torch.float64), made


DEGENERATE = Case("gated", "silu", True, 1, 2, 1, 1, 1, "similar", 1, 1.0, 1)


@examples(80)
@given(cases())
@example(DEGENERATE)
@example(Case("stacked", "gelu", False, 7, 23, 33, 5, 16, "similar", 3, 5.0, 4))
@example(Case("plain", "prelu", True, 7, 23, 33, 5, 16, "similar", 3, 5.0, 4))
def test_forward_and_all_gradients_equal_the_masked_dense_model(case: Case) -> None:
    sparse, _, exact, made = run(case, torch.float64)
    assert len(sparse) >= 10
    for name, value in exact.items():
        torch.testing.assert_close(sparse[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    for selection in made:
        assert selection.neurons.shape == (selection.tiles.shape[0], case.k)
        for chosen in selection.neurons.tolist():
            assert len(set(chosen)) == case.k and 0 <= min(chosen) <= max(chosen) < case.m


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@examples(20)
@given(cases(least=5, alpha=3.0))
def test_rounding_is_that_of_the_stock_model(dtype: torch.dtype, case: Case) -> None:
    """Its root mean square over the output and all gradients is at most three times the stock one, or a few roundings:
    in a single number, such as the gradient of a PReLU, one side's may happen to cancel."""
    sparse, stock, exact, _ = run(case, dtype)

    def error(found: dict[str, Tensor]) -> float:
        several = {n: value for n, value in exact.items() if value.numel() > 1 and value.any()}
        parts = [(found[n].double() - value).norm() / value.norm() for n, value in several.items()]
        return torch.stack(parts).square().mean().sqrt().item()

    assert error(sparse) <= 3 * error(stock) + 4 * torch.finfo(dtype).eps


@examples(30)
@given(cases())
def test_all_neurons_are_the_dense_model(case: Case) -> None:
    module, _, _ = replace(case, k=case.m).made()
    x = case.x()
    with dense_forward(module):
        expected = module(x)
    torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)


# What should not matter


@examples(30)
@given(cases(), st.integers(0, 99))
def test_order_of_tokens_with_all_neurons(case: Case, seed: int) -> None:
    module, _, _ = replace(case, k=case.m).made()
    order = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(module(case.x()[order]), module(case.x())[order], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tile_order", ORDERS)
@examples(20)
@given(cases(), st.integers(0, 3), st.integers(1, 16), st.integers(0, 99))
def test_order_of_tokens_in_whole_tiles(tile_order: str, case: Case, rounds: int, size: int, seed: int) -> None:
    """Without spare slots, and with every token scored (16 of a tile are). Tiles of similar tokens are the same in any
    order; consecutive ones if they, and the tokens in them, change places."""
    case = replace(case, tile_order=tile_order, tokens=size << rounds, tile_size=size)
    module, _, _ = case.made()
    generator = torch.Generator().manual_seed(seed)
    if tile_order == "similar":
        order = torch.randperm(case.tokens, generator=generator)
    else:
        tiles = torch.arange(case.tokens).view(-1, size)[torch.randperm(1 << rounds, generator=generator)]
        order = tiles[:, torch.randperm(size, generator=generator)].flatten()
    with recorded_selections() as made:
        expected, found = module(case.x())[order], module(case.x()[order])
    assert case.k == case.m or made[0].tiles.shape == (1 << rounds, size) or size == 1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@examples(30)
@given(cases(sketch_rank=12), st.integers(0, 3), st.integers(1, 16), st.integers(0, 99))
def test_order_of_neurons(case: Case, rounds: int, size: int, seed: int) -> None:
    """Of the rows of W1, b1 and U and the columns of W2: the sketch is full, so the same neurons are chosen, but for
    those that add nothing. Without spare slots: whose tile a repeated token joins is as good as a draw."""
    case = replace(case, tokens=size << rounds, tile_size=size)
    module, mlp, _ = case.made()
    order = torch.randperm(case.m, generator=torch.Generator().manual_seed(seed))
    stacked = torch.cat([order, order + case.m]) if case.kind == "stacked" else order
    mlp.index.refresh()
    expected = module(case.x())
    with torch.no_grad():
        for projection in mlp.projections:
            rows = stacked if projection.is_input else order
            projection.set_rows(projection.rows()[rows].clone())
            projection.update.U.copy_(projection.update.U[rows].clone())
            if projection.is_input and projection.bias is not None:
                projection.bias.copy_(projection.bias[rows].clone())
    mlp.index.build()
    torch.testing.assert_close(module(case.x()), expected, rtol=1e-9, atol=1e-9)


@examples(30)
@given(cases(activation="relu", bias=False), st.integers(-12, 12))
def test_size_of_tokens(case: Case, power: int) -> None:
    """ReLU without biases (times as much again if gated) is homogeneous, and so is the choice: to the bit, for powers
    of two."""
    module, mlp, _ = case.made()
    degree = 2 if case.kind in ("gated", "stacked") else 1
    x, factor = case.x(), 2.0**power
    with torch.no_grad():
        for bias in (p.bias for p in mlp.projections if p.bias is not None):  # Conv1D always has one
            bias.zero_()
        assert torch.equal(module(x * factor), module(x) * factor**degree)


@examples(20)
@given(cases(), st.integers(1, 3))
def test_folds_and_unpatching_leave_the_function(case: Case, folds: int) -> None:
    module, mlp, _ = case.made(fold_steps=1)
    x = case.x()
    with dense_forward(module), torch.no_grad():
        dense = module(x)
    with recorded_selections() as made, sparse_forward(module), torch.no_grad():
        sparse = module(x)
    for step in range(1, folds + 1):
        assert sync_model(module, step).folded
    assert all(p.update.is_zero() and p.update.restarts == folds for p in mlp.projections)
    mlp.selection_override = [Part(None, made[0].tiles.tokens, made[0])] if made else None
    with torch.no_grad():
        with sparse_forward(module):
            torch.testing.assert_close(module(x), sparse, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(unpatch_model(module)(x), dense, rtol=1e-9, atol=1e-9)


# Inputs and weights that cannot be told apart


@pytest.mark.filterwarnings("ignore:the base weights of")  # which the test overwrites
@examples(40)
@given(
    cases(),
    st.sampled_from(["zeros", "equal", "one outlier", "huge", "tiny", "nan", "inf"]),
    st.sampled_from(["as they are", "zeros", "constant", "duplicate neurons", "dead neurons"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_degenerate_tokens_and_weights(case: Case, tokens: str, weights: str, dtype: torch.dtype) -> None:
    """Distinct neurons are chosen, and outputs are finite where dense ones are; NaN stays NaN."""
    module, mlp, _ = case.made(dtype)
    with torch.no_grad():
        for projection in mlp.projections:
            rows = projection.rows().clone()
            if weights == "zeros":
                rows.zero_()
            elif weights == "constant":
                rows.fill_(0.25)
            elif weights == "duplicate neurons":
                rows[:] = rows[:1]
            elif weights == "dead neurons":
                rows[::2] = 0
            projection.set_rows(rows)
            projection.update.restart()
    x = case.x()
    with torch.no_grad():
        if tokens in ("zeros", "equal"):
            x[:] = x[0] * (tokens == "equal")
        elif tokens in ("one outlier", "nan", "inf"):
            x[-1] = {"one outlier": 100.0, "nan": torch.nan, "inf": torch.inf}[tokens]
        else:
            x *= {"huge": 30.0, "tiny": 1e-6}[tokens]
    x = x.to(dtype)
    with recorded_selections() as made, sparse_forward(module), torch.no_grad():
        found = module(x)
        with dense_forward(module):
            finite = module(x).isfinite().all(1)
    assert len(made) == (case.k < case.m)
    for chosen in [chosen for selection in made for chosen in selection.neurons.tolist()]:
        assert len(set(chosen)) == case.k and 0 <= min(chosen) <= max(chosen) < case.m
    assert finite[:-1].all() or tokens == "huge"
    assert found[finite].isfinite().all()
    assert tokens != "nan" or found[-1].isnan().all()
