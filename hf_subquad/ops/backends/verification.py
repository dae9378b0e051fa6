"""Checks that the kernels compute on this device what PyTorch does."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..token_tiles import TokenTiles
from .interface import Backend, EstimatedInput, MergedWeight, Scoring
from .torch_backend import TorchBackend

# Few, and multiples of what kernels load at once, as in real models: that decides which code is compiled.
_TOKENS, _TILES, _SIZE, _SAMPLED = 250, 4, 64, 16
_WIDTH, _NEURONS, _ACTIVE, _RANK, _SKETCH = 128, 256, 64, 16, 32
_MANY = 1200, 2, 640  # tokens, tiles and slots: a group too large for the kernel that bisects small ones
_TOLERANCES = {torch.bfloat16: (3e-2, 5e-2), torch.float32: (1e-3, 5e-3)}  # of products, and of scores
_LOOSER = 1.02  # tiles may vary that much more within than PyTorch's


@dataclass(frozen=True)
class _Inputs:
    """What the operations are tried on.

    Attributes:
        x: [N, d].
        a: [n, T, k].
        low: [N, 2 q].
        into: one projection, with a bias [m].
        out_of: one projection, with a bias [d].
        gate_and_up: two projections without biases.
        sample: [n, t, d].
        silu: the scoring of a gated MLP.
        relu: the scoring of a plain one.
        scores: [n, m].
        features: [1200, r], in some directions wider than in others.
    """

    x: Tensor
    a: Tensor
    low: Tensor
    tiles: TokenTiles
    neurons: Tensor
    into: list[MergedWeight]
    out_of: list[MergedWeight]
    gate_and_up: list[MergedWeight]
    sample: Tensor
    silu: Scoring
    relu: Scoring
    scores: Tensor
    features: Tensor


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
        given = _inputs(device, dtype, dtype, torch.float32)
        exact = _inputs(device, dtype, torch.float64, torch.float64)
        for name, operation, difference in _operations(*_TOLERANCES[dtype]):
            expected = [value.cpu() for value in operation(TorchBackend(), exact)]
            try:
                # Compared on the host: indices out of range would be the end of all work on the device.
                differs = difference([value.cpu() for value in operation(backend, given)], expected, exact)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                return f"{name} failed with {type(error).__name__}: {error}"
            if differs is not None:
                return f"{name} {differs}"
    return None


def _inputs(device: torch.device, rounded: torch.dtype, compute: torch.dtype, kept: torch.dtype) -> _Inputs:
    """The same values on every call, rounded to one dtype: activations and rows in `compute`, the rest in `kept`."""
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

    def estimated(of: MergedWeight) -> EstimatedInput:
        return EstimatedInput(drawn(_NEURONS, _SKETCH, scale=_SKETCH**-0.5).to(kept), of.u, of.v, of.bias)

    def shuffled(count: int) -> Tensor:
        return torch.randperm(count, generator=generator, device="cpu")

    into, gate_and_up = projection(_NEURONS), [projection(), projection()]
    basis, norms = drawn(_SKETCH, _WIDTH, scale=_WIDTH**-0.5).to(kept), drawn(_NEURONS).to(kept).square()
    entries = shuffled(_TILES * _SIZE).view(_TILES, _SIZE)
    neurons = torch.stack([shuffled(_NEURONS)[:_ACTIVE].sort().values for _ in range(_TILES)])
    widths = torch.arange(1, _SKETCH + 1, device="cpu", dtype=torch.float32).reciprocal().to(rounded).to(device, kept)
    return _Inputs(
        x=drawn(_TOKENS, _WIDTH).to(compute),
        a=drawn(_TILES, _SIZE, _ACTIVE).to(compute),
        low=drawn(_TOKENS, 2 * _RANK).to(compute),
        tiles=TokenTiles(entries.to(device), _TOKENS),
        neurons=neurons.to(device),
        into=[into],
        out_of=[replace(into, bias=drawn(_WIDTH).to(compute))],
        gate_and_up=gate_and_up,
        sample=drawn(_TILES, _SAMPLED, _WIDTH).to(compute),
        silu=Scoring(basis, [estimated(each) for each in gate_and_up], F.silu, norms),
        relu=Scoring(basis, [estimated(into)], F.relu, norms),
        scores=drawn(_TILES, _NEURONS).to(kept),
        features=drawn(_MANY[0], _SKETCH).to(kept) * widths,
    )


_Operation = Callable[[Backend, _Inputs], list[Tensor]]
_Difference = Callable[[list[Tensor], list[Tensor], _Inputs], str | None]


def _operations(products: float, scores: float) -> list[tuple[str, _Operation, _Difference]]:
    """Each with its name and what says how two results differ."""
    far, scored = _further_than(products), _further_than(scores)
    return [
        ("gathered_up with one matrix", lambda how, i: _gathered_up(how, i, i.into), far),
        ("gathered_up with two matrices", lambda how, i: _gathered_up(how, i, i.gate_and_up), far),
        ("gathered_down with one matrix", lambda how, i: _gathered_down(how, i, i.out_of), far),
        ("gathered_down with two matrices", lambda how, i: _gathered_down(how, i, i.gate_and_up), far),
        ("update_gradients", _update_gradients, far),
        ("tile_scores of a gated MLP with SiLU", lambda how, i: [how.tile_scores(i.sample, i.silu)], scored),
        ("tile_scores of a plain MLP with ReLU", lambda how, i: [how.tile_scores(i.sample, i.relu)], scored),
        ("top_neurons", lambda how, i: [how.top_neurons(i.scores, _ACTIVE)], _other_neurons),
        *(_bisection(*shape) for shape in ((_TOKENS, _TILES, _SIZE), _MANY)),
    ]


def _gathered_up(backend: Backend, given: _Inputs, matrices: list[MergedWeight]) -> list[Tensor]:
    out = [backend.compact(given.a.new_empty(given.a.numel()), given.tiles, _ACTIVE) for _ in matrices]
    low = backend.gathered_up(given.x, given.tiles, given.neurons, matrices, out)
    return [*out, low]


def _gathered_down(backend: Backend, given: _Inputs, matrices: list[MergedWeight]) -> list[Tensor]:
    a = [given.a, given.a.flip(1)][: len(matrices)]
    return list(backend.gathered_down(a, given.tiles, given.neurons, matrices))


def _update_gradients(backend: Backend, given: _Inputs) -> list[Tensor]:
    a_low, x_low = given.low.chunk(2, dim=1)  # views of wider rows, as those of gate and up are
    return list(backend.update_gradients(given.a, a_low, given.x, x_low, given.tiles, given.neurons, _NEURONS))


def _further_than(tolerance: float) -> _Difference:
    def difference(found: list[Tensor], expected: list[Tensor], given: _Inputs) -> str | None:
        if [value.shape for value in found] != [value.shape for value in expected]:
            return "gives other shapes"
        errors = [
            float((one.double() - other.double()).norm() / other.double().norm())
            for one, other in zip(found, expected, strict=True)
        ]
        wrong = [error for error in errors if not error <= tolerance]  # NaN is wrong, too
        return f"has a relative error of {wrong[0]:.2g}, where {tolerance:g} is allowed" if wrong else None

    return difference


def _other_neurons(found: list[Tensor], expected: list[Tensor], given: _Inputs) -> str | None:
    one, other = (values[0].sort(dim=1).values for values in (found, expected))
    if one.shape != other.shape:
        return "gives another shape"
    if torch.equal(one, other):
        return None
    missed = sum(len(set(right) - set(chosen)) for right, chosen in zip(other.tolist(), one.tolist(), strict=True))
    return f"misses {missed} of the {other.numel()} neurons with the largest scores"


def _bisection(tokens: int, count: int, size: int) -> tuple[str, _Operation, _Difference]:
    def variance(features: Tensor, entries: Tensor) -> float:
        return float(features[entries.view(count, size) % tokens].var(dim=1).sum())

    def difference(found: list[Tensor], expected: list[Tensor], given: _Inputs) -> str | None:
        if not torch.equal(found[0].flatten().sort().values, torch.arange(count * size, device="cpu")):
            return "does not give every entry once"
        features = given.features[:tokens].cpu()
        ratio = variance(features, found[0]) / variance(features, expected[0])
        if ratio <= _LOOSER:
            return None
        return f"makes tiles that vary {ratio:.3g} times as much within as PyTorch's, where {_LOOSER} is allowed"

    return f"bisect of {tokens} tokens", lambda how, i: [how.bisect(i.features[:tokens], count, size)], difference
