"""Section `correctness`: Triton against PyTorch in float64 on the same values, and what a GPU alone can show.

An error is ||got - expected|| / ||expected||, the largest of an operation's results.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_subquad import sparse_mlps
from hf_subquad.index.activation_index import Selection
from hf_subquad.layers.sparse_mlp import SparseMLP
from hf_subquad.ops.backends import backend_for
from hf_subquad.ops.token_tiles import tile_shape

from .bench import NEEDS_CUDA, Bench, Case, Row, dtype_name
from .clock import captured
from .problem import OPERATIONS, Problem, ProblemSize, make

PRODUCTS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Scores are an estimate: squares of differences magnify rounding, and fp32 products may be told to be tf32.
SCORES = {torch.float32: 5e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
LAYER = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # one product's rounding goes into the next
MOST = 5  # times that, however far PyTorch's own result is from float64
SPREAD = 1.05  # tokens of a tile may lie this much farther apart than in PyTorch's tiles

PRODUCTION = ProblemSize("production", 8192, 64, 128, 2112, 14336, 4096, 16)
ODD = ProblemSize("odd, spare slots", 1000, 8, 131, 97, 333, 515, 3)
SINGLE = ProblemSize("tiles of one token", 37, 37, 1, 64, 512, 128, 8)
TINY_ODD = ProblemSize("tiny, odd, spare slots", 21, 4, 6, 7, 20, 33, 3)
TINY_SINGLE = ProblemSize("tiny, tiles of one token", 5, 5, 1, 16, 32, 16, 2)


def cases(bench: Bench) -> list[Case]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    if bench.tiny:
        order = [(TINY_ODD, fp32), (TINY_SINGLE, fp32), (TINY_ODD, fp16), (TINY_ODD, bf16)]
    else:
        order = [(PRODUCTION, bf16), (ODD, bf16), (SINGLE, bf16), (ODD, fp32), (ODD, fp16), (SINGLE, fp32)]
    late = [] if bench.tiny else [(PRODUCTION, fp32), (PRODUCTION, fp16)]

    def of_sizes(some: list[tuple[ProblemSize, torch.dtype]]) -> list[Case]:
        return [
            (f"operations, {size.name}, {dtype_name(dtype)}", partial(_operations, bench, size, dtype))
            for size, dtype in some
        ]

    first = [bench.dtype] if bench.tiny else [bf16, fp32]
    return [
        *of_sizes(order[:2]),
        *((f"MLP, {dtype_name(dtype)}", partial(_mlp, bench, dtype)) for dtype in first),
        ("selection twice", lambda: _determinism(bench)),
        *(
            (name, partial(check, bench) if bench.on_gpu else partial(_skipped, name))
            for name, check in _ON_GPU.items()
        ),
        *of_sizes(order[2:]),
        ("torch.compile", lambda: _compiled(bench)),
        *of_sizes(late),
    ]


def _operations(bench: Bench, size: ProblemSize, dtype: torch.dtype) -> Iterator[Row]:
    about = {"shape": size.name, "dtype": dtype_name(dtype)}
    if dtype is torch.bfloat16 and not bench.on_gpu:
        yield {"check": "operations", **about, "note": f"{NEEDS_CUDA}: the interpreter multiplies bf16 wrongly"}
        return
    triton, pytorch = _backends(bench)
    problem = make(size, dtype, bench.device)
    exact = problem.to(torch.float64)
    for name, operation in OPERATIONS.items():
        expected = operation(pytorch, exact)
        _poison(bench)
        error = _error(operation(triton, problem), expected)
        beside = _error(operation(pytorch, problem), expected)
        tolerance = (SCORES if "scores" in name else PRODUCTS)[dtype]
        yield _judged({"check": name, **about}, error, tolerance) | {"pytorch_error": _written(beside)}
    yield {"check": "top_neurons", **about} | _top_neurons(triton, pytorch, problem)
    yield {"check": "bisect", **about} | _bisect(triton, pytorch, problem)


def _top_neurons(triton: Any, pytorch: Any, problem: Problem) -> Row:
    """Ascending, and the k largest scores, exactly."""
    scores, k = pytorch.tile_scores(problem.sample.float(), problem.to(torch.float32).gated), problem.size.active
    got = triton.top_neurons(scores, k)
    ascending = bool((got[:, 1:] > got[:, :-1]).all())
    largest = torch.equal(scores.gather(1, got).sort(1).values, scores.topk(k, dim=1).values.sort(1).values)
    return {"passed": ascending and largest, "ascending": ascending, "largest": largest}


def _bisect(triton: Any, pytorch: Any, problem: Problem) -> Row:
    """Each entry once, and tiles of tokens as close to each other as PyTorch's."""
    size = problem.size
    count, slots = tile_shape(size.tokens, max(2, size.slots))
    got, expected = (backend.bisect(problem.features, count, slots) for backend in (triton, pytorch))
    whole = torch.equal(got.flatten().sort().values, torch.arange(count * slots, device=got.device))
    spread = (_spread(problem.features, got) / _spread(problem.features, expected)).item()
    return {"passed": whole and spread <= SPREAD, "each_entry_once": whole, "spread_over_pytorch": spread}


def _spread(features: Tensor, entries: Tensor) -> Tensor:
    """Mean squared distance of tokens to the middle of their tile."""
    tiles = features[entries % len(features)].double()
    return (tiles - tiles.mean(1, keepdim=True)).square().mean()


def _mlp(bench: Bench, dtype: torch.dtype) -> Iterator[Row]:
    """Output and gradients of one MLP, each against float64 with the same selection."""
    for shape in (bench.main, bench.other):
        layer = _trained(bench.sparse_mlp(shape, dtype))
        x, grad = bench.batch(shape, dtype)
        mlp = sparse(layer)
        selection = mlp.index.select(x.detach(), mlp.k, mlp.runtime.config.tile_size, "similar")
        _poison(bench)
        got = _outputs(layer, x, grad, selection)
        exact = _with_backend(layer, torch.float64)
        expected = _outputs(exact, x.detach().double().requires_grad_(True), grad.double(), selection)
        del exact
        beside = _outputs(_with_backend(layer, dtype), x, grad, selection)
        for name in expected:
            error, other = (_error([values[name]], [expected[name]]) for values in (got, beside))
            about = {"check": f"MLP: {name}", "shape": shape.name, "dtype": dtype_name(dtype)}
            # Near zero a ReLU turns rounding into gradients that are there or not, in PyTorch as well.
            tolerance = max(LAYER[dtype], min(1.5 * other, MOST * LAYER[dtype]) if math.isfinite(other) else 0.0)
            yield _judged(about, error, tolerance) | {"pytorch_error": _written(other)}


def _determinism(bench: Bench) -> Iterator[Row]:
    layer, x, grad = _example(bench)
    mlp = sparse(layer)
    size = mlp.runtime.config.tile_size
    first, second = (mlp.index.select(x.detach(), mlp.k, size, "similar") for _ in range(2))
    same = torch.equal(first.tiles.entries, second.tiles.entries) and torch.equal(first.neurons, second.neurons)
    yield {"check": "selection: two runs are equal", "passed": same}
    runs = [_outputs(layer, x, grad, first) for _ in range(2)]
    same = all(torch.equal(runs[0][name], runs[1][name]) for name in ("y", "grad x"))
    yield {"check": "output and gradient of x: two runs are equal to the bit", "passed": same}


def _no_sync(bench: Bench) -> Iterator[Row]:
    name = "a training forward and backward never waits for the device"
    layer, x, grad = _example(bench)
    _gradients(layer, x, grad)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _gradients(layer, x, grad)
        why = None
    except RuntimeError as error:
        why = str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    yield {"check": name, "passed": why is None, "why": why}


def _selection_in_graph(bench: Bench) -> Iterator[Row]:
    name = "selection replayed from a CUDA graph on new tokens equals eager"
    layer, x, _ = _example(bench)
    mlp, held = sparse(layer), x.detach().clone()

    def select() -> tuple[Tensor, Tensor]:
        selection = mlp.index.select(held, mlp.k, mlp.runtime.config.tile_size, "similar")
        return selection.tiles.entries, selection.neurons

    graph, results = captured(select)
    held.copy_(torch.randn_like(held))
    graph.replay()
    replayed = [result.clone() for result in results]
    passed = all(torch.equal(a, b) for a, b in zip(replayed, select(), strict=True))
    yield {"check": name, "passed": passed}


def _training_in_graph(bench: Bench) -> Iterator[Row]:
    name = "MLP forward and backward replayed from a CUDA graph on new tokens, against eager"
    layer, x, grad = _example(bench)
    graph, results = captured(lambda: _gradients(layer, x, grad))
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        grad.copy_(torch.randn_like(grad))
    graph.replay()
    replayed = [result.clone() for result in results]
    # Gradients of U are summed in no fixed order.
    yield _judged({"check": name}, _error(replayed, _gradients(layer, x, grad)), 1e-3)


_ON_GPU = {
    "waits for the device": _no_sync,
    "selection in a CUDA graph": _selection_in_graph,
    "training in a CUDA graph": _training_in_graph,
}


def _skipped(name: str) -> Iterator[Row]:
    yield {"check": name, "note": NEEDS_CUDA}


def _compiled(bench: Bench) -> Iterator[Row]:
    """By Inductor on a GPU; on a CPU the graph is captured and run as it is, as compiling it takes long."""
    layer, x, grad = _example(bench)
    backend = "inductor" if bench.on_gpu else "aot_eager"
    expected = _gradients(layer, x, grad)
    got = _gradients(torch.compile(layer, fullgraph=True, backend=backend), x, grad, list(_trainable(layer)))
    row = {"check": "torch.compile(fullgraph=True) of an MLP, against eager", "compiler": backend}
    yield _judged(row, _error(got, expected), LAYER[bench.dtype])


def _example(bench: Bench) -> tuple[nn.Module, Tensor, Tensor]:
    """A sparse MLP of the main shape with a live update, tokens and a gradient."""
    layer = bench.once("checked MLP", lambda: _trained(bench.sparse_mlp(bench.main, bench.dtype)))
    return layer, *bench.batch(bench.main)


@torch.no_grad()
def _trained(layer: nn.Module) -> nn.Module:
    """Both factors of every update nonzero, as after some training."""
    for projection in sparse(layer).projections:
        for factor in projection.update.parameters():
            factor.copy_(torch.randn_like(factor) * factor.shape[1] ** -0.5 / 4)
    return layer


def sparse(layer: nn.Module) -> SparseMLP:
    return sparse_mlps(layer)[0]


def _with_backend(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another dtype, computed by PyTorch operations."""
    other = copy.deepcopy(layer).to(dtype)
    sparse(other).index.backend_name = "torch"
    return other


def _outputs(layer: nn.Module, x: Tensor, grad: Tensor, selection: Selection) -> dict[str, Tensor]:
    """Output and gradients of x and of the updates, with a given selection."""
    sparse(layer).selection_override = selection
    try:
        y, grad_x, *of_factors = _gradients(layer, x, grad)
    finally:
        sparse(layer).selection_override = None
    named = {"y": y, "grad x": grad_x}
    for (name, _), gradient in zip(_named_trainable(layer), of_factors, strict=True):
        named[f"grad {name}"] = gradient
    return named


def _gradients(layer: nn.Module, x: Tensor, grad: Tensor, factors: Sequence[Tensor] | None = None) -> list[Tensor]:
    y = layer(x)
    factors = list(_trainable(layer)) if factors is None else factors
    return [y.detach(), *torch.autograd.grad(y, [x, *factors], grad)]


def _named_trainable(layer: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, weight) for name, weight in layer.named_parameters() if weight.requires_grad]


def _trainable(layer: nn.Module) -> Iterator[Tensor]:
    return (weight for _, weight in _named_trainable(layer))


def _backends(bench: Bench) -> tuple[Any, Any]:
    return backend_for("triton", bench.device), backend_for("torch", bench.device)


def _judged(row: Row, error: float, tolerance: float) -> Row:
    return {**row, "passed": error <= tolerance, "error": _written(error), "tolerance": tolerance}


def _written(error: float) -> float | str:
    """As JSON holds it, which knows neither NaN nor infinity."""
    return error if math.isfinite(error) else str(error)


def _error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative Frobenius error; NaN if one is."""
    errors = [
        torch.linalg.vector_norm(a.double() - b.double()) / torch.linalg.vector_norm(b.double())
        for a, b in zip(got, expected, strict=True)
    ]
    return torch.stack(errors).max().item()


def _poison(bench: Bench) -> None:
    """Leave NaN in the memory that the next results are written to."""
    if bench.on_gpu:
        held = [torch.full((1 << power,), torch.nan, device=bench.device) for power in range(10, 28)]
        del held
