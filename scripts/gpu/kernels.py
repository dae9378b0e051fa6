"""Section `kernels`: each operation by itself, beside the dense GEMM's rate and PyTorch's time."""

from collections.abc import Iterator
from functools import partial

import torch
from benchmarks.layer import Subjects
from torch import Tensor

from hf_subquad.layers.sparse_mlp import SparseMLP
from hf_subquad.ops.backends import MergedWeight, backend_for, triton_products

from .bench import Bench, Case, Row
from .clock import Work

# Name; the work, and the same by the PyTorch backend, if it has that; useful FLOP, without low-rank update and padding;
# or bytes: inputs read once, outputs written once; gathered rows and scratch of tiles count as often as they are used.
Kernel = tuple[str, list[Work], float, float]


def cases(bench: Bench) -> list[Case]:
    return [(mlp, partial(_mlp, bench, mlp)) for mlp in bench.mlps]


@torch.no_grad()
def _mlp(bench: Bench, name: str) -> Iterator[Row]:
    with torch.enable_grad():  # the patch tests itself
        subjects = Subjects(bench.layer(name, classes=False))
    x, mlp = subjects.x.detach(), subjects.mlp
    weight = mlp.inputs[0].rows().t()
    dense_ms = bench.clock.median(lambda: x @ weight)
    dense = 2 * len(x) * weight.numel() / dense_ms / 1e9
    about = {"mlp": name, "active": mlp.k, "dtype": bench.dtype}
    yield {"kernel": "dense GEMM, all neurons", **about, "ms": dense_ms, "tflops": dense, "of_dense_rate": 1.0}
    for kernel, (work, *pytorch), flop, moved in _kernels(bench, mlp, x):
        launched = bench.clock.median(work, total_ms=60)
        device_ms, why_not = bench.clock.device_ms(work, total_ms=60)
        ms = launched if device_ms is None else device_ms
        row: Row = {"kernel": kernel, **about, "ms": ms, "launched_ms": launched, "graph_note": why_not}
        if flop:
            row |= {"tflops": flop / ms / 1e9, "of_dense_rate": flop / ms / 1e9 / dense}
        else:
            row |= {"bytes": moved, "gb_per_second": moved / ms / 1e6}
        if pytorch:
            row["pytorch_ms"] = bench.clock.median(pytorch[0], total_ms=60, most=20)
        yield row


def _kernels(bench: Bench, mlp: SparseMLP, x: Tensor) -> Iterator[Kernel]:
    both = [backend_for(name, bench.device) for name in ("triton", "torch")]
    index = mlp.index
    index.backend_name = "triton"
    selection = index.select(x, mlp.k, bench.tile, "similar")
    tiles, neurons = selection.tiles, selection.neurons
    (n, slots), (m, d), k, value = tiles.shape, mlp.inputs[0].rows().shape, neurons.shape[1], x.itemsize
    into = [projection.matrix(x.dtype, contiguous=True) for projection in mlp.inputs]
    out_of: list[MergedWeight] = [mlp.output.matrix(x.dtype, contiguous=True), into[0]]
    a = [torch.randn(n * slots * k, device=x.device).to(x.dtype) for _ in into]
    for count, name in ((1, ""), (2, ", two matrices")):
        up, down = [], []
        for backend in both:
            views = [backend.compact(flat, tiles, k) for flat in a[:count]]
            up.append(partial(backend.gathered_up, x, tiles, neurons, into[:count], views))
            down.append(partial(backend.gathered_down, views, tiles, neurons, out_of[:count]))
        flop = 2.0 * count * n * slots * k * d
        yield f"gathered_up{name}", up, flop, 0
        yield f"gathered_down{name}", down, flop, 0
    u, view, low = into[0].u, both[0].compact(a[0], tiles, k), x @ into[0].v.to(x.dtype).t()
    read, rank = (n * slots * k + low.numel()) * value, u.shape[1]
    per_token = partial(triton_products.per_token, view, tiles.entries, neurons, u, len(x))
    yield "per_token", [per_token], 0, read + n * k * rank * u.itemsize
    per_neuron = partial(triton_products.per_neuron, view, tiles.entries, neurons, low, m)
    yield "per_neuron", [per_neuron], 0, read + (n * k + m) * rank * 4
    features = (x @ index.sketch.basis[:32].t().to(x.dtype)).float()
    moved = max(1, n.bit_length() - 1) * (features.numel() * 4 + 16 * len(x))
    yield "bisect", [partial(each.bisect, features, n, slots) for each in both], 0, moved
    sample = x[tiles.slots[:, :: -(-slots // index.scored_tokens(slots))]]
    scores = index.tile_scores(sample)

    def score(backend: str) -> None:
        index.backend_name = backend
        index.tile_scores(sample)

    moved = sample.numel() * value + (index.sketch.codes.numel() + 2 * u.numel() + scores.numel()) * 4
    yield "tile_scores", [partial(score, "triton"), partial(score, "torch")], 0, moved
    moved = scores.numel() * 4 + n * k * 8
    yield "top_neurons", [partial(each.top_neurons, scores, k) for each in both], 0, moved
