"""What is recorded of every MLP in a dense step, and from it: output errors by budget, corrections, and gradients."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..index.selection_quality import outputs
from ..layers.budget import TokenClass
from ..layers.classify_tokens import TokenClasses
from ..layers.compensation import Compensation, CompensationFit
from ..layers.dense_or_sparse import dense_forward
from ..layers.forward_passes import computed_again
from ..layers.sparse_mlp import SparseMLP
from ..weights.projection_with_update import compute_dtype

SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # of the neurons, at which MLPs are measured and may run
_MULTIPLE = 8  # of neurons, which GEMMs like
_TILES_AT_ONCE = 8
_FITTED_TOKENS = 8192  # of a class, to which corrections are fitted
_INDEXED_TOKENS = 2048  # of a class, to which an index is fitted


@dataclass
class MLPCall:
    """An MLP's input in one pass, and the gradient of its output.

    Attributes:
        x: its input [..., d], in the dtype that it computes in.
        classes: of its tokens; None: all are alike.
        energy: squared norm of the gradient of its output, by token: float32 [N]; zeros if there is none.
    """

    x: Tensor
    classes: TokenClasses | None
    energy: Tensor

    @property
    def tokens(self) -> Tensor:
        """[N, d]."""
        return self.x.reshape(-1, self.x.shape[-1])

    def rows(self) -> dict[TokenClass, Tensor]:
        """Rows of each class."""
        if self.classes is None:
            return {"predicted": torch.arange(self.x.shape[:-1].numel(), device=self.x.device)}
        found: dict[TokenClass, Tensor] = {"predicted": self.classes.predicted, "context": self.classes.context}
        return {token_class: rows for token_class, rows in found.items() if len(rows)}


class TokenClassMeasurements:
    """One MLP on the tokens of one class: corrections fitted to some batches, errors judged on another.

    Attributes:
        ks: numbers of neurons that are measured.
        errors: by k, or None for all neurons, the relative error of the MLP's output, corrected.
        costs: the same for the squared error of each token times the squared gradient there, summed: to first order and
            up to a common factor, the squared effect of the error on the loss.
    """

    def __init__(self, mlp: SparseMLP, ks: Sequence[int]) -> None:
        self._mlp = mlp
        self.ks = list(ks)
        self.corrections: dict[int, Compensation] = {}
        self.errors: dict[int | None, float] = {None: 0.0}
        self.costs: dict[int | None, float] = {None: 0.0}

    def fit(self, tokens: Tensor) -> None:
        """Fit corrections to tokens [N, d] of the class.

        Raises:
            CalibrationError: tokens, or what was missed on them, are too large to be squared in float32.
        """
        # What a selection misses differs by tile, and whole tokens explain little more of it than the sketch.
        fits = {k: CompensationFit(self._mlp.index.sketch.basis, whole=not k) for k in self.ks}
        for _, x, _, missed in outputs_by_tiles(self._mlp, tokens, self.ks):
            for k, fit in fits.items():
                fit.add(x, missed[k])
        self.corrections = {k: fit.solve() for k, fit in fits.items()}

    def judge(self, tokens: Tensor, energy: Tensor) -> None:
        """Measure the remaining error on tokens [N, d] of another batch, with gradients of squared norm `energy` [N].

        Raises:
            CalibrationError: the MLP's output is too large to be squared in float32.
        """
        whole, missing = 0.0, dict.fromkeys(self.ks, 0.0)
        costs: dict[int | None, float] = {k: 0.0 for k in (None, *self.ks)}
        for slots, x, added, missed in outputs_by_tiles(self._mlp, tokens, self.ks):
            whole += added.square().sum().item()
            for k, correction in self.corrections.items():
                by_token = (missed[k] - correction(x.float())).square().sum(1)
                missing[k] += by_token.sum().item()
                costs[k] += (by_token * energy[slots]).sum().item()
        if not math.isfinite(whole):
            raise CalibrationError(
                f"the output of {self._mlp.name} is too large to be measured: the model has diverged"
            )
        self.errors |= {k: math.sqrt(error / whole) if whole else 0.0 for k, error in missing.items()}
        self.costs = costs


def neuron_counts(neurons: int) -> list[int]:
    """The numbers k of neurons that are measured and may be planned: `SHARES` of m, in multiples of 8."""
    counts = {-(-round(neurons * share) // _MULTIPLE) * _MULTIPLE for share in SHARES}
    return sorted(k for k in counts if 0 < k < neurons)


def tokens_by_class(calls: Sequence[MLPCall]) -> dict[TokenClass, Tensor]:
    """Tokens [N, d] of each class in some calls, subsampled evenly if there are many."""
    found: dict[TokenClass, list[Tensor]] = {}
    for call in calls:
        for token_class, rows in call.rows().items():
            found.setdefault(token_class, []).append(call.tokens[rows])
    return {token_class: _some(torch.cat(tokens), _FITTED_TOKENS) for token_class, tokens in found.items()}


def fit_index(mlp: SparseMLP, by_class: Mapping[TokenClass, Tensor]) -> None:
    """Fit an MLP's index to its tokens, of which no class may outnumber the others by far."""
    mlp.index.fit(torch.cat([_some(tokens, _INDEXED_TOKENS) for tokens in by_class.values()]))


def _some(tokens: Tensor, most: int) -> Tensor:
    return tokens[:: -(-len(tokens) // most)]


def outputs_by_tiles(
    mlp: SparseMLP, tokens: Tensor, ks: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor, dict[int, Tensor]]]:
    """Yield, for a few tiles at a time: rows [S] of tokens [N, d]; those tokens [S, d]; what all neurons add to the
    MLP's output on them, [S, d_out]; and, by k, what the neurons add that a selection of k skips, [S, d_out]. The last
    two are float32.

    Each neuron is computed once per tile, together with the others between two consecutive k.
    """
    config, ks = mlp.runtime.config, sorted(ks)
    tiles = mlp.index.tile(tokens, config.tile_size, config.tile_order)
    for slots in tiles.slots.split(_TILES_AT_ONCE):
        tile_tokens = tokens[slots]
        ranked = mlp.index.ranked(tile_tokens, ks[-1])
        others = torch.ones(len(slots), mlp.index.neurons, device=ranked.device).scatter_(1, ranked, 0).nonzero()
        parts = [*ranked.tensor_split(ks[:-1], 1), others[:, 1].view(len(slots), -1)]
        kept, *skipped = [outputs(mlp.index, tile_tokens, part).float() for part in parts]
        missed = dict(zip(reversed(ks), itertools.accumulate(reversed(skipped)), strict=True))
        yield slots.flatten(), tile_tokens.flatten(0, 1), kept + missed[ks[0]], missed


@contextmanager
def recording(model: nn.Module, mlps: Sequence[SparseMLP]) -> Iterator[Mapping[str, list[MLPCall]]]:
    """Context manager: inside, the model runs dense, and every MLP's calls are recorded, by the MLP's name.

    Raises:
        CalibrationError: tokens are not finite, or none reached an MLP.
    """
    calls: dict[str, list[MLPCall]] = {mlp.name: [] for mlp in mlps}
    with dense_forward(model), ExitStack() as hooks:
        for mlp in mlps:
            hooks.enter_context(mlp.opens.register_forward_pre_hook(_record_input(mlp, calls[mlp.name])))
            hooks.enter_context(mlp.output.register_forward_hook(_record_gradient(calls[mlp.name])))
        yield calls
    missing = sorted(name for name, seen in calls.items() if not any(len(call.tokens) for call in seen))
    if missing:
        raise CalibrationError(
            f"no token of these batches reached {', '.join(missing[:4])}: calibrate with batches as in training, or "
            "leave these MLPs out with exclude_modules"
        )


def _record_input(mlp: SparseMLP, calls: list[MLPCall]) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if computed_again():
            return
        x = args[0].detach()
        if not torch.isfinite(x).all():
            raise CalibrationError(f"the input of {mlp.name} holds NaN or infinite values")
        classes = mlp.runtime.classes_in(mlp.runtime.passes.of(mlp.name, x), mlp.name, x)
        energy = torch.zeros(x.shape[:-1].numel(), device=x.device)
        calls.append(MLPCall(x.to(compute_dtype(x)), classes, energy))

    return record


def _record_gradient(calls: list[MLPCall]) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        if computed_again():
            return
        call = calls[-1]

        def note(gradient: Tensor) -> None:
            call.energy = gradient.reshape(-1, gradient.shape[-1]).float().square().sum(1)

        if y.requires_grad:
            y.register_hook(note)

    return record
