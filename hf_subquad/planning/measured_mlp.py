"""Every MLP of a model, measured on a few batches: what each of its budgets costs in time and in fidelity."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..head.patch_head import head_as_in_training
from ..layers.batch_hook import watch_batches
from ..layers.budget import Budget, TokenClass
from ..layers.classify_tokens import BatchClasses, TokenClasses
from ..layers.patched_mlps import patched_parts
from ..layers.shared_state import Runtime
from ..layers.sparse_mlp import SparseMLP
from ..logs import get_logger
from ..ops.mlp_products import WORTH_GATHERING, without_autocast
from ..ops.row_sampling import keep_probabilities
from ..plan import LayerPlan
from .allocation import Option
from .divergence import Batch
from .fidelity import DenseReference
from .measured_token_class import MLPCall, TokenClassMeasurements, fit_index, neuron_counts, recording, tokens_by_class
from .mlp_timing import MLPTiming, time_mlp

GRADIENT_SHARES = (0.99, 0.98, 0.97, 0.95, 0.9, 0.8, 0.65, 0.5)
_TIMED_SHARE = 0.9  # of the gradient

_LEAST_TIME = 0.05  # of the exact one
_WORTH_SAMPLING = 0.97  # of it: above, rows are not worth their noise

logger = get_logger(__name__)


@dataclass(frozen=True)
class MeasuredMLP:
    """The measurements of one MLP, from which its budget is chosen.

    Attributes:
        classes: by token class, errors and corrections of each number of neurons.
        timing: times of some budgets, of an MLP of this shape.
        dropped: by class and gradient share, the rows that are expected to pass no gradient, as a share of all rows
            that have some.
        timed_dropped: the same for all classes in the pass that was timed, at `_TIMED_SHARE`.
        tokens, dtype: of the call that it was measured on.
    """

    mlp: SparseMLP
    classes: Mapping[TokenClass, TokenClassMeasurements]
    timing: MLPTiming
    dropped: Mapping[TokenClass, Mapping[float, float]]
    timed_dropped: float
    tokens: int
    dtype: str

    def budgets(self, share: float) -> Iterator[Budget]:
        """All budgets that may be planned, with the whole gradient or, if that saves time, a share of it."""
        if self.ms(Budget(gradient=share)) > _WORTH_SAMPLING * self.ms(Budget()):
            share = 1.0
        counts: list[list[int | None]] = [[None, *measured.ks] for measured in self.classes.values()]
        for neurons, gradient in itertools.product(itertools.product(*counts), (1.0, share)):
            by_class = dict(zip(self.classes, neurons, strict=True))
            predicted = by_class.get("predicted")
            yield Budget(predicted, by_class.get("context", predicted), gradient)

    def forward_cost(self, budget: Budget) -> float:
        """Squared effect on the loss of what the forward pass skips, up to a common factor."""
        return sum(measured.costs[budget.neurons(name)] for name, measured in self.classes.items())

    def ms(self, budget: Budget) -> float:
        """Milliseconds of any budget: the exact time less the savings of its parts, estimated from timed budgets."""
        total = exact = self.timing.budgets[Budget()]
        for name in self.classes:
            if (k := budget.neurons(name)) is not None:
                total += self._ms_of(name, k) - exact
        if budget.gradient < 1:
            # A tile's products take all of its rows, whether they pass gradients or not.
            saved = exact - self.timing.budgets[Budget(gradient=_TIMED_SHARE)]
            dense = [name for name in self.classes if budget.neurons(name) is None]
            dropped = sum(self.dropped[name][budget.gradient] for name in dense)
            total -= max(0.0, saved) * dropped / max(self.timed_dropped, 1e-6)
        return max(total, _LEAST_TIME * exact)

    def run_with(self, budget: Budget) -> None:
        self.mlp.set_budget(budget)
        chosen = ((name, measured, budget.neurons(name)) for name, measured in self.classes.items())
        self.mlp.corrections = {name: measured.corrections[k] for name, measured, k in chosen if k is not None}

    def planned(self, option: Option, why_all: str) -> LayerPlan:
        m, budget = self.mlp.index.neurons, option.budget
        predicted, context = budget.counts(m)
        errors = {name: measured.errors[budget.neurons(name)] for name, measured in self.classes.items()}
        return LayerPlan(
            name=self.mlp.name,
            neurons=m,
            predicted=predicted,
            context=context,
            gradient=budget.gradient,
            error=errors.get("predicted", 0.0),
            context_error=errors.get("context", 0.0),
            full_ms=self.timing.full,
            dense_ms=self.timing.dense,
            sparse_ms=option.ms,
            why_all=why_all,
        )

    def _ms_of(self, token_class: TokenClass, k: int) -> float:
        """With k neurons for one class, on the straight line through those that were timed."""
        known = {x: self.timing.budgets[only(token_class, x)] for x in _timed_counts(self.mlp, token_class)}
        if k in known:
            return known[k]
        (low, low_ms), (high, high_ms) = [(x, ms) for x, ms in sorted(known.items()) if x][:2]
        return max(0.0, low_ms + max(0.0, high_ms - low_ms) / max(1, high - low) * (k - low))


def measure_mlps(model: nn.Module, batches: Sequence[Batch]) -> tuple[list[MeasuredMLP], DenseReference, BatchClasses]:
    """Measure every MLP of a patched model. Indices stay fitted, and corrections are overwritten.

    Returns:
        The MLPs; predictions and gradient of the dense model on the last batch, on which what is fitted to the others
        is evaluated; and the classes of that batch's tokens.
    """
    runtime, mlps = patched_parts(model)
    find_classes(model, runtime, batches)
    seen = recorded(model, mlps, batches[:-1] or batches)
    classes: dict[str, dict[TokenClass, TokenClassMeasurements]] = {}
    with without_autocast(mlps[0].output.weight.device):
        for mlp in mlps:
            by_class = tokens_by_class(seen.pop(mlp.name))
            fit_index(mlp, by_class)
            counts = neuron_counts(mlp.index.neurons)
            classes[mlp.name] = {
                name: TokenClassMeasurements(mlp, [0, *counts] if name == "context" else counts) for name in by_class
            }
            for name, measured in classes[mlp.name].items():
                measured.fit(by_class[name])
    with recording(model, mlps) as judged:
        reference = DenseReference(model, batches[-1])
    ran = runtime.passes.latest or BatchClasses({})
    batch = ran.whole or ran
    with without_autocast(mlps[0].output.weight.device):
        for mlp in mlps:
            classes[mlp.name] = _judged(classes[mlp.name], judged[mlp.name], batch.of_stack(mlp.name))
    timings: dict[tuple[Any, ...], tuple[MLPTiming, float]] = {}
    measured_mlps = []
    for mlp in mlps:
        call = judged[mlp.name][0]
        left_out = _left_out(ran, call)
        shapes = tuple((p.shape, p.weight.dtype, p.source_class) for p in mlp.projections)
        key = (shapes, call.x.shape, call.x.dtype, left_out, *classes[mlp.name])
        if key not in timings:
            timings[key] = _timed(mlp, call, classes[mlp.name], left_out)
        measured_mlps.append(
            MeasuredMLP(
                mlp, classes[mlp.name], timings[key][0], _dropped(judged[mlp.name]), timings[key][1],
                len(call.tokens), str(call.x.dtype).removeprefix("torch."),
            )
        )  # fmt: skip
    return measured_mlps, reference, batch


def recorded(model: nn.Module, mlps: Sequence[SparseMLP], batches: Sequence[Batch]) -> dict[str, list[MLPCall]]:
    """Every MLP's inputs on some batches, in dense passes without gradients."""
    shape = tuple(batches[0]["input_ids"].shape) if isinstance(batches[0].get("input_ids"), Tensor) else "?"
    logger.info(f"Calibrating {len(mlps)} MLPs on {len(batches)} batches of {shape} tokens")
    with head_as_in_training(model), recording(model, mlps) as seen:
        for batch in batches:
            model(**batch)
    return dict(seen)


def find_classes(model: nn.Module, runtime: Runtime, batches: Sequence[Batch]) -> None:
    """Let the model's passes find the classes of tokens, and test whether padding can be skipped, on the first batch
    that has some, unless that is known."""
    watch_batches(model, runtime)
    for batch in batches:
        if runtime.padding.may_skip is not None or runtime.try_skipping_padding(model, batch):
            break


def only(token_class: TokenClass, k: int) -> Budget:
    return Budget(predicted=k) if token_class == "predicted" else Budget(context=k)


def _timed_counts(mlp: SparseMLP, token_class: TokenClass) -> list[int]:
    """Numbers of neurons of a class that are timed: two, and none."""
    counts = neuron_counts(mlp.index.neurons)
    return ([0] if token_class == "context" else []) + [counts[len(counts) // 4], counts[-2 if len(counts) > 2 else -1]]


def _left_out(ran: BatchClasses, call: MLPCall) -> int:
    """Tokens of padding in a batch that an MLP did not see in a call, because the model ran without padding."""
    seen, whole = ran.stacks.get("only"), ran.whole and ran.whole.stacks.get("only")
    return whole.tokens - seen.tokens if seen and whole and seen.tokens == len(call.tokens) else 0


def _timed(
    mlp: SparseMLP, call: MLPCall, classes: Mapping[TokenClass, TokenClassMeasurements], left_out: int
) -> tuple[MLPTiming, float]:
    """Times of an MLP, and the share of the rows with gradients that did not pass them in the timed pass."""
    budgets = [Budget(), Budget(gradient=_TIMED_SHARE)]
    budgets += [only(name, k) for name in classes for k in _timed_counts(mlp, name)]
    autocast = mlp.output.quantization is None and call.x.dtype != mlp.output.dtype  # 4 bits compute in any dtype
    mlp.corrections = {name: next(iter(measured.corrections.values())) for name, measured in classes.items()}
    with torch.autocast(call.x.device.type, dtype=call.x.dtype, enabled=autocast):
        return time_mlp(mlp, call, budgets, left_out), sum(shares[_TIMED_SHARE] for shares in _dropped([call]).values())


def _dropped(calls: Sequence[MLPCall]) -> dict[TokenClass, dict[float, float]]:
    """By class and gradient share, how many rows are expected to pass none back, as a share of all that have some."""
    found: dict[TokenClass, dict[float, float]] = {}
    rows = max(1, sum(int((call.energy > 0).sum()) for call in calls))
    for call in calls:
        for share in GRADIENT_SHARES:
            kept = keep_probabilities(call.energy.sqrt(), share)
            for name, of_class in call.rows().items():
                shares = found.setdefault(name, dict.fromkeys(GRADIENT_SHARES, 0.0))
                passing = kept[of_class].sum().item()
                if passing < WORTH_GATHERING * len(of_class):
                    shares[share] += (int((call.energy[of_class] > 0).sum()) - passing) / rows
    return found


def _judged(
    classes: Mapping[TokenClass, TokenClassMeasurements], calls: Sequence[MLPCall], batch: TokenClasses | None
) -> dict[TokenClass, TokenClassMeasurements]:
    """Judge each class on what its MLP saw of another batch; classes that have no tokens there are dropped."""
    kept: dict[TokenClass, TokenClassMeasurements] = {}
    for name, measured in classes.items():
        if name == "context" and batch is not None and not len(batch.context):
            continue  # in a row without padding, the last tokens of sequences: there is nothing to judge a budget by
        found = [(call, rows[name]) for call in calls if name in (rows := call.rows())]
        if found:
            measured.judge(
                torch.cat([call.tokens[rows] for call, rows in found]),
                torch.cat([call.energy[rows] for call, rows in found]),
            )
            kept[name] = measured
    return kept
