"""Section `kernels`: each operation by itself, beside the dense GEMM's rate and PyTorch's time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_subquad.ops.backends import EstimatedInput, MergedWeight, Scoring, backend_for, triton_products
from hf_subquad.ops.token_tiles import TokenTiles

from .bench import Bench, Case, Row, Shape, dtype_name
from .clock import Work

_SAMPLED = 16  # tokens of a tile that are scored
_DIRECTIONS = 64  # of a sketch


@dataclass
class Problem:
    """Random inputs of production's sizes: N tokens of d features in n tiles of T slots, k of m neurons, rank q.

    Attributes:
        a: [n, T, k] each, of two matrices.
        inputs: into neurons, two; outputs: the same rows with a bias [d].
        features: float32 [N, 32], what tiles are made by.
    """

    x: Tensor
    x_low: Tensor
    a: list[Tensor]
    tiles: TokenTiles
    neurons: Tensor
    inputs: list[MergedWeight]
    outputs: list[MergedWeight]
    scoring: Scoring
    features: Tensor

    @classmethod
    def make(cls, bench: Bench, shape: Shape) -> "Problem":
        torch.manual_seed(1)

        def some(*sizes: int, spread: float = 1.0) -> Tensor:
            return (spread * torch.randn(*sizes, device=bench.device)).to(bench.dtype)

        n, d, m, q = max(1, bench.tokens // bench.tile), shape.hidden, shape.intermediate, bench.rank
        slots, k = -(-bench.tokens // n), backend_for("triton", bench.device).round_up_k(shape.active)
        entries = torch.randperm(n * slots, device=bench.device).view(n, slots)
        neurons = torch.rand(n, m, device=bench.device).argsort(1)[:, :k].sort(1).values
        factors = [(some(m, q, spread=q**-0.5).float(), some(q, d, spread=d**-0.5).float()) for _ in range(2)]
        inputs = [MergedWeight(some(m, d, spread=d**-0.5), u, v, some(m)) for u, v in factors]
        r = min(_DIRECTIONS, d)
        estimated = [
            EstimatedInput(some(m, r, spread=r**-0.5).float(), u, v, some(m, spread=0.1).float()) for u, v in factors
        ]
        basis, norms = some(r, d, spread=d**-0.5).float(), some(m).float().square()
        return cls(
            x=some(bench.tokens, d),
            x_low=some(bench.tokens, q),
            a=[some(n, slots, k) for _ in range(2)],
            tiles=TokenTiles.of(entries, bench.tokens),
            neurons=neurons,
            inputs=inputs,
            outputs=[replace(matrix, bias=some(d)) for matrix in inputs],
            scoring=Scoring(basis, estimated[: 1 + shape.gated], F.silu if shape.gated else F.relu, norms),
            features=torch.randn(bench.tokens, min(32, d), device=bench.device),
        )


@dataclass(frozen=True)
class Kernel:
    """Attributes:
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


def _shape(bench: Bench, shape: Shape) -> Iterator[Row]:
    p = Problem.make(bench, shape)
    weight = p.inputs[0].rows.t()
    about = {"shape": shape.name, "active": p.neurons.shape[1], "dtype": dtype_name(bench.dtype)}
    dense_ms = bench.clock.median(lambda: p.x @ weight)
    dense = 2 * len(p.x) * shape.hidden * shape.intermediate / dense_ms / 1e9
    yield {"kernel": "dense GEMM, all neurons", **about, "ms": dense_ms, "tflops": dense, "of_dense_rate": 1.0}
    for kernel in _kernels(bench, p):
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


def _kernels(bench: Bench, p: Problem) -> Iterator[Kernel]:
    triton: Any = backend_for("triton", bench.device)
    pytorch: Any = backend_for("torch", bench.device)
    entries, neurons, u = p.tiles.entries, p.neurons, p.inputs[0].u
    n, slots, k = p.a[0].shape
    tokens, (m, rank), value = len(p.x), u.shape, p.x.itemsize
    for count, name in ((1, ""), (2, ", two matrices")):
        flops = 2.0 * count * n * slots * k * p.x.shape[1]
        up, down = [], []
        for backend in (triton, pytorch):
            out = [backend.compact(torch.empty_like(a).view(-1), p.tiles, k) for a in p.a[:count]]
            up.append(partial(backend.gathered_up, p.x, p.tiles, neurons, p.inputs[:count], out))
            down.append(partial(backend.gathered_down, p.a[:count], p.tiles, neurons, p.outputs[:count]))
        yield Kernel(f"gathered_up{name}", *up, flops=flops)
        yield Kernel(f"gathered_down{name}", *down, flops=flops)
    read = (n * slots * k + tokens * rank) * value
    yield Kernel(
        "per_token",
        lambda: triton_products.per_token(p.a[0], entries, neurons, u, tokens),
        bytes=read + n * k * rank * u.itemsize,
    )
    yield Kernel(
        "per_neuron",
        lambda: triton_products.per_neuron(p.a[0], entries, neurons, p.x_low, m),
        bytes=read + (n * k + m) * rank * 4,
    )
    rounds = max(1, n.bit_length() - 1)
    tile = -(-tokens // (1 << rounds))
    sample = p.x[p.tiles.slots[:, :: -(-slots // _SAMPLED)]]
    scores = pytorch.tile_scores(sample, p.scoring)
    codes = sum(each.codes.numel() + each.u.numel() for each in p.scoring.inputs) * 4
    yield Kernel(
        "bisect",
        *(partial(each.bisect, p.features, 1 << rounds, tile) for each in (triton, pytorch)),
        bytes=rounds * (p.features.numel() * p.features.itemsize + 16 * tokens),
    )
    yield Kernel(
        "tile_scores",
        *(partial(each.tile_scores, sample, p.scoring) for each in (triton, pytorch)),
        bytes=sample.numel() * value + codes + scores.numel() * 4,
    )
    yield Kernel(
        "top_neurons",
        *(partial(each.top_neurons, scores, k) for each in (triton, pytorch)),
        bytes=scores.numel() * 4 + n * k * 8,
    )
