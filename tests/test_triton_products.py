"""Triton products of token tiles with gathered rows, against dense products in float64.

Without a GPU, Triton's interpreter runs the kernels (float32 and float16 only).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
pytest.importorskip("triton", minversion="3.3")

from hf_subquad.ops.backends import triton_products as products
from hf_subquad.ops.backends.triton_common import precision
from hf_subquad.ops.backends.triton_products import Blocks

DEVICE = "cuda" if GPU else "cpu"
ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass
class Case:
    """Inputs of the products of one or two matrices.

    Attributes:
        a: [n, T, k] each, NaN in spare slots.
        rows: [m, d] each.
        lows: [N, q] each.
        us, vs: [m, q] and [q, d] each, float32.
        bias: [d].
    """

    x: Tensor
    entries: Tensor
    neurons: Tensor
    a: list[Tensor]
    rows: list[Tensor]
    lows: list[Tensor]
    biases: list[Tensor | None]
    us: list[Tensor]
    vs: list[Tensor]
    bias: Tensor | None

    @property
    def spare(self) -> Tensor:
        """Bool [n, T]."""
        return self.entries >= len(self.x)


def make(
    tokens: int, slots: int, active: int, neurons: int, width: int, rank: int, matrices: int = 1, extra_tiles: int = 0,
    bias: bool = True, dtype: torch.dtype = torch.float32, device: str = DEVICE,
) -> Case:  # fmt: skip
    tiles = -(-tokens // slots) + extra_tiles
    chosen = torch.rand(tiles, neurons, device=device).argsort(1)[:, :active].sort(1).values
    entries = torch.randperm(tiles * slots, device=device).view(tiles, slots)

    def some(*shape: int) -> list[Tensor]:
        return [torch.randn(*shape, device=device) for _ in range(matrices)]

    a = [values.masked_fill_((entries >= tokens).unsqueeze(-1), torch.nan) for values in some(tiles, slots, active)]
    return Case(
        x=some(tokens, width)[0].to(dtype), entries=entries, neurons=chosen, a=[values.to(dtype) for values in a],
        rows=[values.to(dtype) for values in some(neurons, width)],
        lows=[values.to(dtype) for values in some(tokens, rank)],
        biases=some(neurons) if bias else [None] * matrices, us=some(neurons, rank), vs=some(rank, width),
        bias=some(width)[0] if bias else None,
    )  # fmt: skip


def by_slot(values: Tensor, entries: Tensor) -> Tensor:
    """[N, c] by token -> float64 [n, T, c] by slot, zero in spare slots."""
    spare = values.new_zeros(max(0, entries.numel() - len(values)), values.shape[1])
    return torch.cat([values, spare]).double()[entries]


def by_token(values: Tensor, case: Case) -> Tensor:
    """[n, T, c] by slot -> [N, c] by token."""
    flat = torch.empty(case.entries.numel(), values.shape[-1], dtype=values.dtype, device=values.device)
    flat[case.entries.reshape(-1)] = values.reshape(-1, values.shape[-1])
    return flat[: len(case.x)]


def all_neurons(a: Tensor, case: Case) -> Tensor:
    """[n, T, k] -> float64 [n, T, m], zero for neurons that the tile does not use, and in spare slots."""
    index = case.neurons.unsqueeze(1).expand(-1, a.shape[1], -1)
    whole = torch.zeros(*a.shape[:2], len(case.rows[0]), dtype=torch.float64, device=a.device)
    return whole.scatter_(2, index, a.double().masked_fill(case.spare.unsqueeze(-1), 0))


def expected_gathered_up(case: Case) -> list[Tensor]:
    """All m neurons of every token, and of those the ones each tile uses."""
    x = by_slot(case.x, case.entries)
    index = case.neurons.unsqueeze(1).expand(-1, x.shape[1], -1)
    results = []
    for rows, low, u, bias in zip(case.rows, case.lows, case.us, case.biases, strict=True):
        whole = x @ rows.double().t() + by_slot(low, case.entries) @ u.to(low.dtype).double().t()
        if bias is not None:
            whole = whole + bias.double()
        results.append(whole.gather(2, index))
    return results


def expected_gathered_down(case: Case) -> Tensor:
    """All m neurons of every token, most of them zero."""
    y = sum(
        by_token(all_neurons(a, case) @ rows.double(), case) + low.double() @ v.to(low.dtype).double()
        for a, rows, low, v in zip(case.a, case.rows, case.lows, case.vs, strict=True)
    )
    return y if case.bias is None else y + case.bias.double()


def expected_per_token(case: Case, i: int) -> Tensor:
    return by_token(all_neurons(case.a[i], case) @ case.us[i].to(case.x.dtype).double(), case)


def expected_per_neuron(case: Case, i: int) -> Tensor:
    return torch.einsum("ntm,ntq->mq", all_neurons(case.a[i], case), by_slot(case.lows[i], case.entries))


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Error within what rounding explains; NaN is never close."""
    assert got.shape == expected.shape
    scale = expected.norm().item()
    assert (got.double() - expected).norm().item() <= ERROR[dtype] * scale
    assert (got.double() - expected).abs().max().item() <= 20 * ERROR[dtype] * max(scale / expected.numel() ** 0.5, 1)


def compact(case: Case, **config: Blocks) -> list[Tensor]:
    out = [case.x.new_full((*case.entries.shape, case.neurons.shape[1]), torch.nan) for _ in case.rows]
    given = case.x, case.entries, case.neurons, case.rows, case.biases, case.us, case.lows
    products.gathered_up(*given, out, **config)
    return out


def check(case: Case, **config: Blocks) -> None:
    """All four products of a case."""
    dtype, layout = case.x.dtype, (case.entries, case.neurons)
    hs = compact(case, **config)
    for h, expected in zip(hs, expected_gathered_up(case), strict=True):
        close(h, expected, dtype)
    y = products.gathered_down(case.a, *layout, case.rows, case.lows, case.vs, case.bias, **config)
    assert y.dtype == dtype
    close(y, expected_gathered_down(case), dtype)
    for i, a in enumerate(case.a):
        low = products.per_token(a, *layout, case.us[i], len(case.x), **config)
        assert low.dtype == dtype
        close(low, expected_per_token(case, i), dtype)
        grad = products.per_neuron(a, *layout, case.lows[i], len(case.us[i]), **config)
        assert grad.dtype == torch.float32
        close(grad, expected_per_neuron(case, i), torch.float32)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory comes full of NaN, so that what a kernel leaves unwritten shows."""
    new_empty = Tensor.new_empty

    def poisoned(*args: Any, **options: Any) -> Tensor:
        memory = new_empty(*args, **options)
        return memory.fill_(torch.nan) if memory.is_floating_point() else memory

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


# tokens N, slots T, active k, neurons m, width d, rank q; the interpreter's blocks are 32 and its groups 2 blocks.
SHAPES = {
    "several blocks and groups": dict(tokens=75, slots=40, active=40, neurons=90, width=70, rank=3),
    "whole blocks": dict(tokens=64, slots=32, active=32, neurons=64, width=64, rank=16),
    "two matrices": dict(tokens=50, slots=20, active=37, neurons=50, width=45, rank=16, matrices=2),
    "two matrices in whole blocks": dict(tokens=32, slots=32, active=64, neurons=70, width=32, rank=1, matrices=2),
    "tiles of one token": dict(tokens=5, slots=1, active=9, neurons=20, width=33, rank=1),
    "one neuron of one": dict(tokens=7, slots=4, active=1, neurons=1, width=1, rank=1),
    "one neuron of many": dict(tokens=7, slots=4, active=1, neurons=40, width=20, rank=3),
    "all neurons": dict(tokens=20, slots=20, active=33, neurons=33, width=65, rank=3, bias=False),
    "a tile of spare slots only": dict(tokens=20, slots=8, active=5, neurons=12, width=16, rank=3, extra_tiles=1),
    "rank beyond a block": dict(tokens=10, slots=5, active=16, neurons=20, width=16, rank=70, matrices=2, bias=False),
    "one token": dict(tokens=1, slots=1, active=3, neurons=4, width=5, rank=2, matrices=2),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_any_shape(shape: str) -> None:
    check(make(**SHAPES[shape]))


HALF = ("two matrices", "one neuron of many", "one token")


@pytest.mark.parametrize("shape", [pytest.param(s, marks=[] if s in HALF else pytest.mark.slow) for s in SHAPES])
def test_products_in_half_precision(shape: str) -> None:
    check(make(**SHAPES[shape], dtype=torch.float16))


@pytest.mark.parametrize("blocks", [Blocks(16, 64, 16, group=1), Blocks(64, 16, 64, group=3)])
def test_blocks_do_not_matter(blocks: Blocks) -> None:
    check(make(tokens=75, slots=40, active=40, neurons=60, width=70, rank=3, matrices=2), config=blocks)


def test_one_of_two_biases() -> None:
    case = make(tokens=9, slots=5, active=7, neurons=10, width=8, rank=2, matrices=2)
    check(replace(case, biases=[None, case.biases[1].half()]))
    check(replace(case, biases=[case.biases[0].double(), None]))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_spare_slots_see_no_token() -> None:
    case = make(tokens=9, slots=5, active=7, neurons=10, width=8, rank=2)
    case.x[0], case.lows[0][0] = torch.inf, torch.nan  # the token that spare slots could read in place of one
    (h,) = compact(case)
    tile, slot = case.spare.nonzero()[0].tolist()
    torch.testing.assert_close(h[tile, slot], case.biases[0][case.neurons[tile]])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("deterministic", [False, True])
def test_spare_slots_add_nothing_to_neurons(deterministic: bool) -> None:
    case = make(tokens=8, slots=4, active=3, neurons=10, width=8, rank=2, extra_tiles=1)
    case.entries, case.lows[0][0] = torch.arange(12, device=DEVICE).view(3, 4), torch.inf  # in the first tile
    case.a[0].normal_()[2] = torch.nan
    case.neurons = torch.arange(9, device=DEVICE).view(3, 3)
    torch.use_deterministic_algorithms(deterministic)
    try:
        grad = products.per_neuron(case.a[0], case.entries, case.neurons, case.lows[0], 10)
    finally:
        torch.use_deterministic_algorithms(False)
    close(grad[3:6], case.a[0][1].double().t() @ case.lows[0][4:].double(), torch.float32)
    assert not grad[6:].any()


def _strange(case: Case) -> Case:
    """The same values in other memory layouts."""

    def transposed(values: Tensor) -> Tensor:
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)

    def part(values: Tensor) -> Tensor:
        """Within a larger tensor of NaN."""
        larger = torch.full([size + 3 for size in values.shape], torch.nan, dtype=values.dtype, device=values.device)
        return larger[tuple(slice(1, 1 + size) for size in values.shape)].copy_(values)

    return replace(
        case, x=transposed(case.x), a=[transposed(case.a[0]), part(case.a[1])], rows=[part(rows) for rows in case.rows],
        lows=[transposed(case.lows[0]), part(case.lows[1])], us=[part(case.us[0]), transposed(case.us[1])],
        vs=[transposed(case.vs[0]), part(case.vs[1])], entries=transposed(case.entries),
        neurons=torch.cat([case.neurons] * 2, 1)[:, :12],
    )  # fmt: skip


def test_strange_strides() -> None:
    case = make(tokens=16, slots=9, active=12, neurons=20, width=24, rank=3, matrices=2)
    check(_strange(case))
    check(replace(case, x=torch.cat([case.x, case.x], 1)[:, :24]))


def test_rows_that_are_columns_of_a_matrix() -> None:
    case = make(tokens=16, slots=9, active=12, neurons=20, width=24, rank=3, matrices=2)
    check(replace(case, rows=[case.rows[0].t().contiguous().t(), case.rows[1]]))
    check(replace(case, rows=[case.rows[0], case.rows[1].t().contiguous().t()]))


def test_biases_of_any_stride() -> None:
    case = make(tokens=16, slots=9, active=12, neurons=20, width=24, rank=3, matrices=2)
    one, pairs = torch.randn(1, device=DEVICE), torch.randn(24, 2, device=DEVICE)
    check(replace(case, biases=[one.expand(20), pairs[:20, 1]], bias=pairs[:, 0]))


def test_expanded_gradients() -> None:
    case = make(tokens=16, slots=9, active=12, neurons=20, width=24, rank=3)
    one = torch.randn(1, device=DEVICE)
    check(replace(case, a=[one.expand(case.a[0].shape)], x=one.expand(case.x.shape)))
    check(replace(case, a=[torch.randn(12, device=DEVICE).expand(case.a[0].shape)]))


def test_offsets_beyond_32_bits() -> None:
    case = make(tokens=6, slots=3, active=4, neurons=5, width=8, rank=2, dtype=torch.float16)
    stride = 2**29 + 16
    try:
        memory = torch.empty(5 * stride, dtype=torch.float16, device=DEVICE)  # on the CPU, what is touched is paid for
    except RuntimeError:
        pytest.skip("needs 5 GiB of address space")
    case.rows = [memory.as_strided((5, 8), (stride, 1)).copy_(case.rows[0])]
    check(case)


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Forbidden:
    """In place of a kernel."""

    def __getitem__(self, grid: Any) -> Any:
        raise AssertionError("launched")


@pytest.mark.usefixtures("_deterministic")
def test_deterministic_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_per_neuron", Forbidden())  # its sums have no fixed order
    case = make(tokens=75, slots=40, active=40, neurons=50, width=8, rank=3)
    check(case)
    torch.use_deterministic_algorithms(False)
    with pytest.raises(AssertionError, match="launched"):
        check(case)


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_runs_are_equal_when_told(dtype: torch.dtype) -> None:
    case = make(8192, 128, 512, 1024, 512, 16, dtype=dtype)  # tiles share neurons
    layout = case.entries, case.neurons

    def run() -> tuple[Tensor, ...]:
        (h,) = compact(case)
        y = products.gathered_down(case.a, *layout, case.rows, case.lows, case.vs, case.bias)
        low = products.per_token(case.a[0], *layout, case.us[0], len(case.x))
        return h, y, low, products.per_neuron(case.a[0], *layout, case.lows[0], len(case.us[0]))

    first = run()
    for _ in range(5):
        for got, want in zip(run(), first, strict=True):
            assert torch.equal(got, want)


def test_parameters_can_be_given() -> None:
    case = make(tokens=9, slots=5, active=7, neurons=10, width=8, rank=2)
    for values in (case.x, case.a[0], case.rows[0], case.lows[0], case.biases[0], case.us[0], case.vs[0], case.bias):
        values.requires_grad_()
    with torch.no_grad():
        check(case)


def test_float32_is_multiplied_as_pytorch_is_told() -> None:
    matmul = torch.backends.cuda.matmul
    setting, value = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, setting)
    assert precision(torch.float32) == "ieee"
    setattr(matmul, setting, value)
    try:
        assert precision(torch.float32) == "tf32"
    finally:
        setattr(matmul, setting, before)
    assert precision(torch.float32) == "ieee"


def test_blocks_of_tokens_waste_little() -> None:
    assert [products._token_block(size, 128) for size in (1, 16, 20, 40, 94, 128, 181, 256)] == [
        16, 16, 32, 64, 128, 128, 64, 128,
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "slots", "active", "neurons", "width", "rank"),
    [
        (2048, 128, 2112, 14336, 4096, 16),
        (2000, 94, 500, 3072, 768, 16),
        (5000, 181, 257, 2000, 1000, 64),
        (300, 1, 64, 1024, 512, 8),
        (700, 20, 100, 1024, 2048, 100),
        (1030, 515, 333, 1001, 515, 3),
    ],
)
def test_products_on_a_device(
    tokens: int, slots: int, active: int, neurons: int, width: int, rank: int, dtype: torch.dtype
) -> None:
    for matrices in (1, 2):
        check(make(tokens, slots, active, neurons, width, rank, matrices, dtype=dtype))


@pytest.mark.gpu
def test_products_in_a_cuda_graph() -> None:
    case = make(500, 94, 96, 512, 256, 16, 2, dtype=torch.bfloat16)
    layout = case.entries, case.neurons

    def run() -> tuple[Tensor, ...]:
        hs = compact(case)
        y = products.gathered_down(case.a, *layout, case.rows, case.lows, case.vs, case.bias)
        low = products.per_token(case.a[0], *layout, case.us[0], len(case.x))
        return *hs, y, low, products.per_neuron(case.a[0], *layout, case.lows[0], len(case.us[0]))

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    for got, want in zip(captured, expected, strict=True):
        torch.testing.assert_close(got, want)
