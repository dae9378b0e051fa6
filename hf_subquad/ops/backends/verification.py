"""Checks that the kernels compute on this device what PyTorch does."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..group_tokens import TokenTiles
from .interface import Backend, MergedWeight, Scoring
from .torch_backend import TorchBackend

# Few, and multiples of what kernels load at once, as in real models: that decides which code is compiled.
_TOKENS, _TILES, _SIZE, _SAMPLED = 250, 4, 64, 16
_WIDTH, _NEURONS, _ACTIVE, _RANK, _SKETCH = 128, 256, 64, 16, 64
_MANY = 1200, 2, 640  # tokens, tiles and slots: a group too large for the kernel that bisects small ones
_TOLERANCES = {torch.bfloat16: (3e-2, 5e-2), torch.float32: (1e-3, 5e-3)}  # of products, and of scores
_LOOSER = 1.02  # tiles may vary that much more within than PyTorch's


_Difference = Callable[[list[Tensor], list[Tensor]], str | None]
_Operation = tuple[str, Callable[[Backend], list[Tensor]], _Difference]


def mismatch(backend: Backend, device: torch.device) -> str | None:
    """Describes the first operation that does not compute what PyTorch does in float64; None if all do.

    In bfloat16 on GPUs and float32 elsewhere, where Triton's interpreter cannot multiply bfloat16. An exception in the
    backend counts, unless the device is out of memory; one in PyTorch's operations is raised. Waits for the device.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # Whatever the caller is in: autograd, inference mode, autocast, a default device, or a compiler's fake tensors.
    with (
        _disable_current_modes(),
        device,
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        tried = _operations(device, dtype, dtype, torch.float32)
        exact = _operations(device, dtype, torch.float64, torch.float64)
        for (name, operation, _), (_, exactly, difference) in zip(tried, exact, strict=True):
            expected = [value.cpu() for value in exactly(TorchBackend())]
            try:
                # Compared on the host: indices out of range would be the end of all work on the device.
                differs = difference([value.cpu() for value in operation(backend)], expected)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                return f"{name} failed with {type(error).__name__}: {error}"
            if differs is not None:
                return f"{name} {differs}"
    return None


def _operations(
    device: torch.device, rounded: torch.dtype, compute: torch.dtype, kept: torch.dtype
) -> list[_Operation]:
    """Each with its name, and what says how two results differ.

    They are tried on the same values in every call, rounded to one dtype: activations and rows are in `compute`, the
    rest in `kept`.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        return (scale * values).to(rounded).to(device)

    def projection(bias: int | None = None) -> MergedWeight:
        return MergedWeight(
            drawn(_NEURONS, _WIDTH, scale=_WIDTH**-0.5).to(compute),
            drawn(_NEURONS, _RANK, scale=_RANK**-0.5).to(kept),
            drawn(_RANK, _WIDTH, scale=_WIDTH**-0.5).to(kept),
            None if bias is None else drawn(bias).to(compute),
        )

    def shuffled(count: int) -> Tensor:
        return torch.randperm(count, generator=generator, device="cpu")

    into, gate_and_up = projection(_NEURONS), [projection(), projection()]
    out_of = replace(into, bias=drawn(_WIDTH).to(compute))
    tiles = TokenTiles(shuffled(_TILES * _SIZE).view(_TILES, _SIZE).to(device), _TOKENS)
    neurons = torch.stack([shuffled(_NEURONS)[:_ACTIVE].sort().values for _ in range(_TILES)]).to(device)
    x, a = drawn(_TOKENS, _WIDTH).to(compute), drawn(_TILES, _SIZE, _ACTIVE).to(compute)
    a_low, x_low = drawn(_TOKENS, 2 * _RANK).to(compute).chunk(2, dim=1)  # views, as those of gate and up are
    sample, scores = drawn(_TILES, _SAMPLED, _WIDTH).to(compute), drawn(_TILES, _NEURONS).to(kept)
    basis, norms = drawn(_SKETCH, _WIDTH, scale=_WIDTH**-0.5).to(kept), drawn(_NEURONS).to(kept).square()
    widths = torch.arange(1, _SKETCH + 1, device="cpu", dtype=torch.float32).reciprocal().to(rounded).to(device, kept)
    features = drawn(_MANY[0], _SKETCH).to(kept) * widths  # in some directions wider than in others

    def gathered_up(backend: Backend, *matrices: MergedWeight) -> list[Tensor]:
        out = [backend.compact(a.new_empty(a.numel()), tiles, _ACTIVE) for _ in matrices]
        return [*out, backend.gathered_up(x, tiles, neurons, matrices, out)]

    def gathered_down(backend: Backend, *matrices: MergedWeight) -> list[Tensor]:
        return list(backend.gathered_down([a, a.flip(1)][: len(matrices)], tiles, neurons, matrices))

    def update_gradients(backend: Backend) -> list[Tensor]:
        return list(backend.update_gradients(a, a_low, x, x_low, tiles, neurons, _NEURONS))

    def scored(activation: Callable[[Tensor], Tensor], *matrices: MergedWeight) -> Callable[[Backend], list[Tensor]]:
        estimated = [replace(m, rows=drawn(_NEURONS, _SKETCH, scale=_SKETCH**-0.5).to(kept)) for m in matrices]
        return lambda backend: [backend.tile_scores(sample, Scoring(basis, estimated, activation, norms))]

    far, scored_otherwise = map(_further_than, _TOLERANCES[rounded])
    return [
        ("gathered_up with one matrix", lambda backend: gathered_up(backend, into), far),
        ("gathered_up with two matrices", lambda backend: gathered_up(backend, *gate_and_up), far),
        ("gathered_down with one matrix", lambda backend: gathered_down(backend, out_of), far),
        ("gathered_down with two matrices", lambda backend: gathered_down(backend, *gate_and_up), far),
        ("update_gradients", update_gradients, far),
        ("tile_scores of a gated MLP with SiLU", scored(F.silu, *gate_and_up), scored_otherwise),
        ("tile_scores of a plain MLP with ReLU", scored(F.relu, into), scored_otherwise),
        ("top_neurons", lambda backend: [backend.top_neurons(scores, _ACTIVE)], _other_neurons),
        *(_bisection(features[: shape[0]], *shape[1:]) for shape in ((_TOKENS, _TILES, _SIZE), _MANY)),
    ]


def _further_than(tolerance: float) -> _Difference:
    def difference(found: list[Tensor], expected: list[Tensor]) -> str | None:
        if [value.shape for value in found] != [value.shape for value in expected]:
            return "gives other shapes"
        errors = [
            float((one.double() - other.double()).norm() / other.double().norm())
            for one, other in zip(found, expected, strict=True)
        ]
        wrong = [error for error in errors if not error <= tolerance]  # NaN is wrong, too
        return f"has a relative error of {wrong[0]:.2g}, where {tolerance:g} is allowed" if wrong else None

    return difference


def _other_neurons(found: list[Tensor], expected: list[Tensor]) -> str | None:
    one, other = (values[0].sort(dim=1).values for values in (found, expected))
    if one.shape != other.shape:
        return "gives another shape"
    if torch.equal(one, other):
        return None
    missed = sum(len(set(right) - set(chosen)) for right, chosen in zip(other.tolist(), one.tolist(), strict=True))
    return f"misses {missed} of the {other.numel()} neurons with the largest scores"


def _bisection(features: Tensor, count: int, size: int) -> _Operation:
    tokens = len(features)

    def variance(entries: Tensor) -> float:
        return float(features.cpu()[entries.view(count, size) % tokens].var(dim=1).sum())

    def difference(found: list[Tensor], expected: list[Tensor]) -> str | None:
        if not torch.equal(found[0].flatten().sort().values, torch.arange(count * size, device="cpu")):
            return "does not give every entry once"
        ratio = variance(found[0]) / variance(expected[0])
        if ratio <= _LOOSER:
            return None
        return f"makes tiles that vary {ratio:.3g} times as much within as PyTorch's, where {_LOOSER} is allowed"

    return f"bisect of {tokens} tokens", lambda backend: [backend.bisect(features, count, size)], difference
