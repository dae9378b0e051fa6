"""Section `kernels`: each operation by itself, beside the dense GEMM's rate and PyTorch's time."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from hf_subquad.ops.backends import backend_for, triton_products

from .bench import Bench, Case, Row, Shape, dtype_name
from .clock import Work
from .problem import Problem, ProblemSize, gathered_down, gathered_up, make


@dataclass(frozen=True)
class Kernel:
    """Attributes:
    work: as it is timed.
    pytorch: the same operation of the PyTorch backend, if there is one.
    flops: useful ones, without the low-rank update and without padding.
    bytes: each input read once, each output written once; gathered rows and scratch of tiles count as often as used.
    """

    name: str
    work: Work
    pytorch: Work | None = None
    flops: float | None = None
    bytes: float | None = None


def cases(bench: Bench) -> list[Case]:
    return [(shape.name, partial(_shape, bench, shape)) for shape in (bench.main, bench.other)]


def problem_of(bench: Bench, shape: Shape) -> Problem:
    """Inputs of production, at the paper's share."""
    tiles = max(1, bench.tokens // bench.tile)
    active = backend_for("triton", bench.device).round_up_k(shape.active)
    size = ProblemSize(
        shape.name, bench.tokens, tiles, -(-bench.tokens // tiles), active, shape.intermediate, shape.hidden, bench.rank
    )
    return make(size, bench.dtype, bench.device)


def _shape(bench: Bench, shape: Shape) -> Iterator[Row]:
    p = problem_of(bench, shape)
    about = {
        "shape": shape.name, "tokens": p.size.tokens, "active": p.size.active, "tile": p.size.slots,
        "dtype": dtype_name(bench.dtype),
    }  # fmt: skip
    weight = p.matrices[0].rows.t()
    dense_ms = bench.clock.median(lambda: p.x @ weight)
    dense = 2 * p.size.tokens * p.size.width * p.size.neurons / dense_ms / 1e9
    yield {"kernel": "dense GEMM, all neurons", **about, "ms": dense_ms, "tflops": dense, "of_dense_rate": 1.0}
    for kernel in _kernels(bench, p, gated=shape.gated):
        launched = bench.clock.median(kernel.work, total_ms=60)
        device_ms, why_not = bench.clock.device_ms(kernel.work, total_ms=60)
        ms = launched if device_ms is None else device_ms
        row: Row = {"kernel": kernel.name, **about, "ms": ms, "launched_ms": launched, "graph_note": why_not}
        if kernel.flops is not None:
            rate = kernel.flops / ms / 1e9
            row |= {"tflops": rate, "of_dense_rate": rate / dense}
        if kernel.bytes is not None:
            row |= {"bytes": kernel.bytes, "gb_per_second": kernel.bytes / ms / 1e6}
        if kernel.pytorch is not None:
            row["pytorch_ms"] = bench.clock.median(kernel.pytorch, total_ms=60, most=20)
        yield row


def _kernels(bench: Bench, p: Problem, gated: bool) -> Iterator[Kernel]:
    triton: Any = backend_for("triton", bench.device)
    pytorch: Any = backend_for("torch", bench.device)
    size, entries, neurons = p.size, p.tiles.entries, p.neurons
    slots = size.tiles * size.slots
    product = 2.0 * slots * size.active * size.width
    rows, us, vs = ([getattr(m, name) for m in p.matrices] for name in ("rows", "u", "v"))
    biases = [matrix.bias for matrix in p.matrices]
    lows, bias = [p.x_low, p.x_low], p.outputs[0].bias
    for count, name in ((1, ""), (2, ", two matrices")):
        first = slice(count)
        yield Kernel(
            f"gathered_up{name}",
            lambda first=first: triton_products.gathered_up(
                p.x, entries, neurons, rows[first], biases[first], us[first], lows[first]
            ),
            flops=count * product,
        )
        yield Kernel(
            f"gathered_down{name}",
            lambda first=first: triton_products.gathered_down(
                p.a[first], entries, neurons, rows[first], lows[first], vs[first], bias
            ),
            flops=count * product,
        )
    value, low = p.x.itemsize, size.tokens * size.rank * p.x.itemsize
    read = slots * size.active * value
    yield Kernel(
        "per_token",
        lambda: triton_products.per_token(p.a[0], entries, neurons, us[0], size.tokens),
        bytes=read + low + size.tiles * size.active * size.rank * us[0].itemsize,
    )
    yield Kernel(
        "per_neuron",
        lambda: triton_products.per_neuron(p.a[0], entries, neurons, p.x_low, size.neurons),
        bytes=read + low + size.tiles * size.active * size.rank * 4 + size.neurons * size.rank * 4,
    )
    for count, name in ((1, ""), (2, ", two matrices")):
        yield Kernel(
            f"operation gathered_up{name}, with x V^T",
            partial(gathered_up, triton, p, count),
            partial(gathered_up, pytorch, p, count),
            flops=count * product,
        )
        yield Kernel(
            f"operation gathered_down{name}, with per_token",
            partial(gathered_down, triton, p, count),
            partial(gathered_down, pytorch, p, count),
            flops=count * product,
        )
    yield from _selection_kernels(triton, pytorch, p, gated)


def _selection_kernels(triton: Any, pytorch: Any, p: Problem, gated: bool) -> Iterator[Kernel]:
    size, sample = p.size, p.sample
    scoring = p.gated if gated else p.plain
    scores = pytorch.tile_scores(sample.float(), p.to(sample.float().dtype).gated)
    rounds = max(1, size.tiles.bit_length() - 1)
    features = p.features.numel() * p.features.itemsize
    yield Kernel(
        "bisect",
        lambda: triton.bisect(p.features, 1 << rounds, -(-size.tokens // (1 << rounds))),
        lambda: pytorch.bisect(p.features, 1 << rounds, -(-size.tokens // (1 << rounds))),
        bytes=rounds * (features + 16 * size.tokens),
    )
    codes = sum(each.codes.numel() + each.u.numel() for each in scoring.inputs) * 4
    yield Kernel(
        "tile_scores",
        lambda: triton.tile_scores(sample, scoring),
        lambda: pytorch.tile_scores(sample, scoring),
        bytes=sample.numel() * sample.itemsize + codes + scores.numel() * 4,
    )
    yield Kernel(
        "top_neurons",
        lambda: triton.top_neurons(scores, size.active),
        lambda: pytorch.top_neurons(scores, size.active),
        bytes=scores.numel() * 4 + size.tiles * size.active * 8,
    )
