"""Do the Triton kernels choose the tiles and neurons that PyTorch would? Interpreted where there is no GPU."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", minversion="3.3")

from hf_subquad.ops.activations import ACTIVATIONS, name_of
from hf_subquad.ops.backends import triton_selection, triton_tiles
from hf_subquad.ops.backends.triton_selection import ProjectedInput, covers, tile_scores, top_neurons
from hf_subquad.ops.backends.triton_tiles import bisect

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::RuntimeWarning:numpy")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# Tiles


def by_definition(features: Tensor, count: int, size: int) -> Tensor:
    """Bisection as `tiling.py` describes it, in float64 with a stable sort."""
    values = features.double()[torch.arange(count * size, device=features.device) % len(features)]
    groups = [torch.arange(count * size, device=features.device)]
    while len(groups) < count:
        halves = []
        for group in groups:
            centred = values[group] - values[group].mean(0)
            covariance = centred.t() @ centred
            direction = covariance[:, covariance.diagonal().argmax()]
            for _ in range(2):
                direction = covariance @ (direction / direction.norm().clamp_min(1e-300))
            along = centred @ (direction / direction.norm().clamp_min(1e-300))
            halves += group[along.argsort(stable=True)].view(2, -1)
        groups = halves
    return torch.stack(groups)


def check_permutation(entries: Tensor, count: int, size: int) -> None:
    assert entries.shape == (count, size) and entries.dtype == torch.int64
    assert torch.equal(entries.flatten().sort().values.cpu(), torch.arange(count * size))


@pytest.fixture(params=["group in a program", "group in many"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small groups in both of the ways that groups are projected."""
    if request.param == "group in many":
        monkeypatch.setattr(triton_tiles, "_HELD", 64)


def same_again(made: Tensor, make: Callable[[], Tensor]) -> bool:
    """On a GPU; the interpreter has one order only."""
    return DEVICE == "cpu" or torch.equal(made, make())


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize(
    ("tokens", "r", "count", "size"),
    [(301, 32, 2, 151), (99, 33, 4, 25), (61, 5, 8, 8), (22, 1, 8, 3),
     *(pytest.param(*shape, marks=pytest.mark.slow) for shape in
       ((600, 32, 2, 300), (611, 3, 4, 153), (90, 1, 8, 12), (61, 5, 32, 2), (64, 64, 8, 8)))],
)  # fmt: skip
def test_tiles_are_those_of_the_definition(tokens: int, r: int, count: int, size: int) -> None:
    features = normal(tokens, r) + 5 * normal(1, r, seed=1)
    entries = bisect(features, count, size)
    check_permutation(entries, count, size)
    assert (entries == by_definition(features, count, size)).double().mean() > 0.99  # all but rounding
    assert same_again(entries, lambda: bisect(features, count, size))


def test_one_tile() -> None:
    assert torch.equal(bisect(normal(7, 2), 1, 9).cpu(), torch.arange(9)[None])


@pytest.mark.usefixtures("held")
def test_a_mean_far_from_zero_costs_no_digits() -> None:
    """Nor does one token far from the others."""
    features = normal(256, 8) * torch.linspace(1, 3, 8, device=DEVICE) + 1e4
    assert (bisect(features, 4, 64) == by_definition(features, 4, 64)).double().mean() > 0.97
    features = normal(256, 8)
    features[0] = 1e3
    assert (bisect(features, 4, 64) == by_definition(features, 4, 64)).double().mean() > 0.97


@pytest.mark.usefixtures("held")
def test_ties_keep_their_order() -> None:
    constant = bisect(torch.full((150, 5), 2.5, device=DEVICE), 2, 75)
    assert torch.equal(constant.flatten().cpu(), torch.arange(150))
    features = torch.randint(0, 3, (300, 1), generator=torch.Generator().manual_seed(0)).float().to(DEVICE)
    assert torch.equal(bisect(features, 2, 150).flatten(), features.flatten().argsort(stable=True))
    zeros = torch.tensor([[0.0, 1.0, -0.0, 0.0, -1.0, -0.0]], device=DEVICE).t()
    assert bisect(zeros, 2, 3).tolist() == [[4, 0, 2], [3, 5, 1]]


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize(
    ("spoil", "rows"), [(NAN, slice(7, 8)), (INF, slice(0, 1)), (3e38, slice(7, 8)), (INF, slice(None))], ids=str
)
def test_whatever_the_features_no_entry_is_lost(spoil: float, rows: slice) -> None:
    features = normal(75, 6)
    features[rows, 2] = spoil
    check_permutation(bisect(features, 4, 19), 4, 19)


# Scores


def importance(sketched: Tensor, inputs: list[ProjectedInput], activation: str, output_norms: Tensor) -> Tensor:
    """The formula of `importance`, in float64."""
    pre = []
    for codes, low, u, bias in inputs:
        estimate = sketched.double() @ codes.double().t() + low.double() @ u.double().t()
        pre.append(estimate if bias is None else estimate + bias.double())
    spread = [values.square().mean(-1, keepdim=True).sqrt() for values in pre]
    activate = ACTIVATIONS[activation]
    now, moved = activate(pre[0]), activate(pre[0] + 0.1 * spread[0])
    if len(pre) == 1:
        scores = now.square() + (moved - now).square()
    else:
        scores = (moved - now).square() * pre[1].square() + now.square() * (pre[1].square() + (0.1 * spread[1]) ** 2)
    return scores.sum(1) * output_norms.double()


def scoring(
    n: int, t: int, r: int, q: int, m: int, gated: bool, bias: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[ProjectedInput], Tensor]:
    """Of tensors that are slices of others, as those of stacked projections are."""
    sketched, *lows = normal(n, t, r + 2 * q).to(dtype).split([r, q, q], dim=-1)
    codes, u = (normal(2 * m, r + 3, seed=1) / r**0.5)[:, :r].split(m), normal(2 * m, q + 1, seed=2)[:, :q].split(m)
    biases = normal(2 * m, seed=3).split(m) if bias else (None, None)
    inputs = list(zip(codes, lows, u, biases, strict=True))[: 1 + gated]
    return sketched, inputs, normal(m, seed=4).square()


def relative_error(values: Tensor, reference: Tensor) -> float:
    return ((values.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize(
    ("multiprocessors", "gated", "bias"), [(1, True, True), (12, False, False)], ids=["one share", "several shares"]
)
@pytest.mark.parametrize(
    ("n", "t", "r", "q", "m"), [(5, 16, 64, 16, 301), (9, 5, 3, 3, 129), (130, 1, 32, 1, 77), (1, 12, 17, 20, 1)]
)
def test_scores(
    n: int, t: int, r: int, q: int, m: int, multiprocessors: int, gated: bool, bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """All neurons in one share, or in several."""
    monkeypatch.setattr(triton_selection, "_multiprocessors", lambda device: multiprocessors)
    sketched, inputs, norms = scoring(n, t, r, q, m, gated, bias)
    scores = tile_scores(sketched, inputs, "silu", norms)
    assert scores.shape == (n, m) and scores.dtype == torch.float32
    assert relative_error(scores, importance(sketched, inputs, "silu", norms)) < (1e-5 if DEVICE == "cpu" else 2e-3)
    assert same_again(scores, lambda: tile_scores(sketched, inputs, "silu", norms))


@pytest.mark.parametrize(("r", "q"), [(128, 16), (64, 70), (256, 16), (16, 130)])
def test_scores_with_high_ranks(r: int, q: int) -> None:
    assert covers(torch.float32, r, q) and not covers(torch.float32, 4 * r + 400, q) and not covers(torch.float64, r, q)
    sketched, inputs, norms = scoring(3, 16, r, q, 70, True, True)
    scores = tile_scores(sketched, inputs, "gelu", norms)
    assert relative_error(scores, importance(sketched, inputs, "gelu", norms)) < (1e-5 if DEVICE == "cpu" else 2e-3)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scores_of_every_activation(activation: str, gated: bool) -> None:
    sketched, inputs, norms = scoring(3, 16, 8, 2, 40, gated, True)
    for scale in (1, 8):  # the latter saturates
        scores = tile_scores(scale * sketched, inputs, activation, norms)
        reference = importance(scale * sketched, inputs, activation, norms)
        assert relative_error(scores, reference) < (2e-6 if DEVICE == "cpu" else 5e-3)


def test_scores_of_half_precision_tokens() -> None:
    sketched, inputs, norms = scoring(3, 16, 32, 4, 100, True, True, torch.float16)
    inputs = [(codes, low, u.half(), bias.half()) for codes, low, u, bias in inputs]
    scores = tile_scores(sketched, inputs, "silu", norms)
    assert relative_error(scores, importance(sketched, inputs, "silu", norms)) < 2e-3  # codes are rounded as well


@pytest.mark.parametrize("activation", ["relu", "silu", "relu_squared"])
def test_a_token_that_is_not_a_number_spoils_its_own_tile_only(activation: str) -> None:
    sketched, inputs, norms = scoring(6, 5, 8, 2, 40, False, False)
    whole = tile_scores(sketched, inputs, activation, norms)
    sketched[2, 3, 0] = NAN
    spoilt = tile_scores(sketched, inputs, activation, norms)
    assert spoilt[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(spoilt[others], whole[others])


# Activations


class Parametric(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() + self.slope


def raises(x: Tensor) -> Tensor:
    raise RuntimeError


def test_names_of_activations() -> None:
    from transformers.activations import ACT2FN

    named = {
        "relu": [nn.ReLU(), nn.ReLU(inplace=True), torch.relu, ACT2FN["relu"]],
        "silu": [nn.SiLU(inplace=True), ACT2FN["silu"], lambda x: x * x.sigmoid()],
        "gelu": [nn.GELU(), ACT2FN["gelu"], nn.functional.gelu],
        "gelu_tanh": [nn.GELU("tanh"), ACT2FN["gelu_new"], ACT2FN["gelu_fast"], ACT2FN["gelu_pytorch_tanh"]],
        "quick_gelu": [ACT2FN["quick_gelu"]],
        "relu_squared": [ACT2FN["relu2"]],
        "sigmoid": [nn.Sigmoid()],
        "tanh": [nn.Tanh(), torch.tanh],
        None: [
            Parametric(), nn.PReLU(), nn.LeakyReLU(), ACT2FN["gelu_10"], ACT2FN["relu6"], nn.ELU(), nn.Mish(),
            nn.RReLU().train(), nn.Dropout(), nn.Identity(), raises, lambda x: x.double().relu(), lambda x: None,
            lambda x: x.relu()[:3], lambda x: x.relu() * NAN,
        ],
    }  # fmt: skip
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        for name, activations in named.items():
            for activation in activations:
                assert name_of(activation) == name == name_of(activation), (activation, name)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.is_grad_enabled()


# The largest scores


def largest(scores: Tensor, k: int) -> Tensor:
    """NaN first, then the larger, then the lower index."""
    ranked = [sorted(range(len(row)), key=lambda j, row=row: (row[j] == row[j], -row[j])) for row in scores.tolist()]
    return torch.tensor([sorted(order[:k]) for order in ranked])


@pytest.fixture
def _short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_selection, "_ROW", 256)
    monkeypatch.setattr(triton_selection, "_GATHERED", 64)


SHAPES = [(1, 1, 1), (3, 70, 1), (3, 70, 70), (2, 129, 33), (1, 1000, 411), (1, 1024, 1023)]


@pytest.mark.parametrize(("n", "m", "k"), SHAPES)
def test_largest(n: int, m: int, k: int) -> None:
    scores = normal(n, m + 3)[:, :m]
    chosen = top_neurons(scores, k)
    assert chosen.shape == (n, k) and chosen.dtype == torch.int64
    assert torch.equal(chosen.cpu(), largest(scores, k))


@pytest.mark.usefixtures("_short_rows")
@pytest.mark.parametrize(("n", "m", "k"), SHAPES)
def test_largest_of_rows_longer_than_a_block(n: int, m: int, k: int) -> None:
    scores = (normal(n, m) * 4).round() / 4  # with ties across blocks
    assert torch.equal(top_neurons(scores, k).cpu(), largest(scores, k))


@pytest.mark.parametrize("k", [1, 5, 10, 16])
def test_largest_of_special_values(k: int) -> None:
    rows = [
        [0.0, -0.0] * 8,
        [-0.0, 0.0, NAN, 1.0, -1.0, INF, -INF, 1e-45, -1e-45, NAN, INF, 3e38, -3e38, 0.0, -NAN, 2.0],
        [NAN] * 16,
        [-INF] * 15 + [NAN],
        [-float(j) for j in range(16)],
        [INF] * 16,
    ]
    scores = torch.tensor(rows, device=DEVICE)
    assert torch.equal(top_neurons(scores, k).cpu(), largest(scores, k))


# On a GPU, at the sizes of a large model


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "r", "count"), [(8192, 32, 64), (8001, 32, 64), (16384, 64, 128), (50000, 32, 512)])
def test_tiles_at_full_size(tokens: int, r: int, count: int) -> None:
    size = -(-tokens // count)
    features = normal(tokens, r) * torch.linspace(1, 4, r, device=DEVICE)
    entries = bisect(features, count, size)
    check_permutation(entries, count, size)
    reference = by_definition(features, count, size)
    shared = [len(set(a) & set(b)) for a, b in zip(entries.tolist(), reference.tolist(), strict=True)]
    assert sum(shared) / (count * size) > 0.98


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_neurons_at_full_size(dtype: torch.dtype, gated: bool, activation: str) -> None:
    sketched, inputs, norms = scoring(64, 16, 64, 16, 14336, gated, False, dtype)
    scores = tile_scores(sketched, inputs, activation, norms)
    reference = importance(sketched, inputs, activation, norms)
    assert relative_error(scores, reference) < 2e-2
    chosen = top_neurons(scores, 2112)
    rows = torch.arange(64, device=DEVICE)[:, None]
    assert torch.equal(scores[rows, chosen].sort(dim=1).values, scores.topk(2112, dim=1).values.flip(1))
    assert (reference[rows, chosen].sum() / reference.topk(2112, dim=1).values.sum()) > 0.999


@pytest.mark.gpu
def test_selection_in_a_graph() -> None:
    """Captured, and replayed on other tokens: nothing waits for the device or depends on what was captured."""
    features = normal(8192, 32)
    sketched, inputs, norms = scoring(64, 16, 64, 16, 14336, True, False, torch.bfloat16)

    def select() -> tuple[Tensor, Tensor]:
        return bisect(features, 64, 128), top_neurons(tile_scores(sketched, inputs, "silu", norms), 2112)

    select()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select()
    features.copy_(normal(8192, 32, seed=8))
    sketched.copy_(normal(64, 16, 64, seed=9).bfloat16())
    for _ in range(20):
        graph.replay()
        for replayed, direct in zip(captured, select(), strict=True):
            assert torch.equal(replayed, direct)
