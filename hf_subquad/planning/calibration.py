"""Measure a patched model on a few real batches, and plan from that what each MLP spends.

Two findings make this cheap (`docs/planning.md` has the numbers). The effect of a small error of an MLP's output on the
loss is its product with the gradient there, so that one backward pass weighs the errors of all budgets of all MLPs. And
the effects of several MLPs add up but for a common factor, which a few passes with all of them give. These passes also
judge: a plan is taken only if the predictions and the gradient of the whole model, with all budgets together, are
faithful enough on a batch to which nothing was fitted.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..config import SubquadConfig
from ..errors import CalibrationError, ConfigError
from ..index.sketch import Sketch
from ..layers.batch_hook import watch_batches
from ..layers.budget import Budget, TokenClass
from ..layers.compensation import Compensation
from ..layers.lookup import patched_parts, require_patched, sparse_mlps
from ..layers.modes import sparse_forward
from ..layers.preserve_mode_and_rng import preserve_mode_and_rng
from ..layers.runtime import Runtime
from ..layers.sparse_mlp import Corrections, SparseMLP
from ..patching.patch import apply_plan, patch_model, unpatch_model
from ..plan import LayerPlan, Plan
from .allocation import Option, allocate, undominated
from .fidelity import DenseReference, Fidelity
from .measurements import ClassMeasurements, MLPCall, neuron_counts, recording, tokens_by_class
from .mlp_timing import MLPTiming, time_mlp
from .predictions import Batch

GRADIENT_SHARES = (0.999, 0.995, 0.99, 0.98, 0.95, 0.9)
COSINE_PER_TOLERANCE = 10.0  # 1 - cosine of the gradient that goes with a nat of tolerance

_ROUNDS = 4
_PROBED_SHARE = 0.98  # of the gradient
_LEAST_TIME = 0.05  # of the exact one
_CLOSE_ENOUGH = 0.75  # of what may be lost is spent

logger = logging.get_logger(__name__)


def calibrate(
    model: nn.Module, batches: Iterable[Batch], config: SubquadConfig | None = None, tolerance: float | None = None
) -> Plan:
    """Measure, and allocate budgets. The model is left as it was, patched or not, random states included.

    Args:
        model: whose outputs have logits or a loss.
        batches: keyword arguments of the model, labels included, on its device and of the size to train with. The last
            one judges what is fitted to the others; two or three will do, from one alone the plan is too hopeful.
        config: of the patch to plan for, if the model is not patched; a patched one has its own.
        tolerance: instead of the config's.

    Raises:
        CalibrationError: no batches, outputs with neither logits nor a loss, or values that are not finite.
        ConfigError: a config was given for a patched model, or the tolerance is not positive.
        PatchError: the model cannot be patched.
    """
    batches = list(batches)
    patched = bool(sparse_mlps(model))
    if patched and config is not None:
        raise ConfigError("the model is patched already, and planned for with its own settings: leave config out")
    if not patched:
        patch_model(model, config)
    try:
        with _restored(require_patched(model)):
            return _calibrate(model, batches, tolerance)
    finally:
        if not patched:
            unpatch_model(model)


def plan_and_fit(model: nn.Module, batches: Iterable[Batch]) -> Plan:
    """`calibrate` a patched model, and leave it with the plan's budgets, a fitted index and corrections.

    Raises:
        CalibrationError: as `calibrate`. The model is as it was.
    """
    mlps = require_patched(model)
    with _restored(mlps):
        plan = _calibrate(model, list(batches), None)
        fitted = [(mlp.index.sketch, mlp.index.tokens, mlp.corrections) for mlp in mlps]
    _adopt(mlps, fitted)
    apply_plan(model, plan)
    return plan


def compensate(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Fit the index of every MLP of a patched model to what it sees, and what stands in for the neurons that its budget
    skips.

    `SubquadCallback` does this at the start of training; a custom loop does it after `patch_model` or `apply_plan`.
    Without it the sparse forward is less accurate, and a plan promises too much.

    Raises:
        CalibrationError: no batches, or tokens that are not finite or too large to be fitted. What was fitted before
            stays.
    """
    batches = list(batches)
    if not batches:
        raise CalibrationError("compensate needs at least one batch")
    runtime, mlps = patched_parts(model)
    mlps = [mlp for mlp in mlps if not mlp.dense]
    if not mlps:
        return
    watch_batches(model, runtime)
    with _restored(mlps), preserve_mode_and_rng(model):
        calls = _recorded(model, runtime, mlps, batches)
        with _no_autocast(mlps):
            corrections = [_fit_budget(mlp, calls[mlp.name]) for mlp in mlps]
        fitted = [(mlp.index.sketch, mlp.index.tokens, c) for mlp, c in zip(mlps, corrections, strict=True)]
    _adopt(mlps, fitted)


@dataclass(frozen=True)
class MeasuredMLP:
    """What is known of one MLP, from which its budget is chosen.

    Attributes:
        classes: by token class, errors and corrections of each number of neurons.
        timing: of some budgets, on an MLP of this shape.
        kept: share of the rows with any gradient that hold each of `GRADIENT_SHARES` of the squared gradient.
        timed_kept: the same for the gradient that was timed, at `_PROBED_SHARE`.
        energy: share of the squared gradient of all trained parameters that its updates have.
        tokens, dtype: of the call that it was measured on.
    """

    mlp: SparseMLP
    classes: Mapping[TokenClass, ClassMeasurements]
    timing: MLPTiming
    kept: Mapping[float, float]
    timed_kept: float
    energy: float
    tokens: int
    dtype: str

    def budgets(self) -> Iterator[Budget]:
        """All that it can run with."""
        counts: list[list[int | None]] = [[None, *measured.ks] for measured in self.classes.values()]
        for neurons, gradient in itertools.product(itertools.product(*counts), (1.0, *GRADIENT_SHARES)):
            by_class = dict(zip(self.classes, neurons, strict=True))
            predicted = by_class.get("predicted")
            yield Budget(predicted, by_class.get("context", predicted), gradient)

    def forward_cost(self, budget: Budget) -> float:
        """Squared effect on the loss of what the forward skips, up to a common factor."""
        found = ((measured, budget.neurons(name)) for name, measured in self.classes.items())
        return sum(0.0 if k is None else measured.costs[k] for measured, k in found)

    def backward_cost(self, budget: Budget) -> float:
        """Squared effect on the gradient of the rows that the backward skips, up to a common factor."""
        return (1 - budget.gradient) * self.energy

    def ms(self, budget: Budget) -> float:
        """Milliseconds of any budget, from those that were timed: what parts save adds up."""
        exact = self.timing.budgets[Budget()]
        if budget.exact:
            return exact
        total = exact
        for name in self.classes:
            if (k := budget.neurons(name)) is not None:
                total += self._ms_of(name, k) - exact
        if budget.gradient < 1:
            # A tile's products take all of its rows, whether they pass gradients or not.
            saved = exact - self.timing.budgets[Budget(gradient=_PROBED_SHARE)]
            saved *= (1 - self.kept[budget.gradient]) / max(1 - self.timed_kept, 1e-6)
            dense = [budget.neurons(name) is None for name in self.classes]
            total -= max(0.0, saved) * sum(dense) / len(dense)
        return max(total, _LEAST_TIME * exact)

    def run_with(self, budget: Budget) -> None:
        self.mlp.set_budget(budget)
        chosen = ((name, measured, budget.neurons(name)) for name, measured in self.classes.items())
        self.mlp.corrections = {name: measured.corrections[k] for name, measured, k in chosen if k is not None}

    def planned(self, option: Option) -> LayerPlan:
        m, budget = self.mlp.index.neurons, option.budget
        errors = {
            name: 0.0 if (k := budget.neurons(name)) is None else measured.errors[k]
            for name, measured in self.classes.items()
        }
        return LayerPlan(
            name=self.mlp.name,
            neurons=m,
            predicted=m if budget.predicted is None else budget.predicted,
            context=m if budget.context is None else budget.context,
            gradient=budget.gradient,
            error=errors.get("predicted", 0.0),
            context_error=errors.get("context", 0.0),
            full_ms=self.timing.full,
            dense_ms=self.timing.dense,
            sparse_ms=option.ms,
        )

    def _ms_of(self, token_class: TokenClass, k: int) -> float:
        """With k neurons for one class, on the straight line through those that were timed."""
        known = {x: self.timing.budgets[_only(token_class, x)] for x in _timed_counts(self.mlp, token_class)}
        if k in known:
            return known[k]
        (low, low_ms), (high, high_ms) = [(x, ms) for x, ms in sorted(known.items()) if x][:2]
        return max(0.0, low_ms + max(0.0, high_ms - low_ms) / max(1, high - low) * (k - low))


def measure_mlps(model: nn.Module, batches: Sequence[Batch]) -> tuple[list[MeasuredMLP], DenseReference, float]:
    """Measure every MLP of a patched model. Indices are left fitted, budgets at what was tried last.

    Returns:
        The MLPs; predictions and gradient of the dense model on the last batch, which judges what is fitted to the
        others; and the seconds of a dense step on it.
    """
    runtime, mlps = patched_parts(model)
    watch_batches(model, runtime)
    seen = _recorded(model, runtime, mlps, batches[:-1] or batches)
    classes: dict[str, dict[TokenClass, ClassMeasurements]] = {}
    with _no_autocast(mlps):
        for mlp in mlps:
            by_class = tokens_by_class(seen.pop(mlp.name))
            mlp.index.fit(torch.cat(list(by_class.values())))
            counts = neuron_counts(mlp.index.neurons)
            classes[mlp.name] = {
                name: ClassMeasurements(mlp, [0, *counts] if name == "context" else counts) for name in by_class
            }
            for name, measured in classes[mlp.name].items():
                measured.fit(by_class[name])
    with recording(model, mlps) as judged:
        started = time.perf_counter()
        reference = DenseReference(model, batches[-1])
        step_seconds = time.perf_counter() - started
    with _no_autocast(mlps):
        for mlp in mlps:
            classes[mlp.name] = _judged(classes[mlp.name], judged[mlp.name])
    timings: dict[tuple[Any, ...], tuple[MLPTiming, float]] = {}
    measured_mlps = []
    for mlp in mlps:
        call = judged[mlp.name][0]
        shapes = tuple((p.weight.shape, p.weight.dtype, p.source_class) for p in mlp.projections)
        key = (shapes, call.x.shape, call.x.dtype, *classes[mlp.name])
        if key not in timings:
            timings[key] = _timed(mlp, call, classes[mlp.name])
        measured_mlps.append(
            MeasuredMLP(
                mlp, classes[mlp.name], timings[key][0], _kept(torch.cat([c.energy for c in judged[mlp.name]])),
                timings[key][1], reference.energy_of([f for p in mlp.projections for f in p.update.parameters()]),
                len(call.tokens), str(call.x.dtype).removeprefix("torch."),
            )
        )  # fmt: skip
    return measured_mlps, reference, step_seconds


def _calibrate(model: nn.Module, batches: Sequence[Batch], tolerance: float | None) -> Plan:
    runtime, mlps = patched_parts(model)
    config = runtime.config
    tolerance = config.tolerance if tolerance is None else tolerance
    if not tolerance > 0:
        raise ConfigError(f"tolerance must be positive, got {tolerance!r}")
    if not batches:
        raise CalibrationError("calibrate needs at least one batch")
    started = time.perf_counter()
    with preserve_mode_and_rng(model):
        measured, reference, step_seconds = measure_mlps(model, batches)
        classes = next(iter(runtime.latest_classes.values()), None)
        with sparse_forward(model):
            chosen, found = _choose(measured, reference, tolerance)
    for one, option in zip(measured, chosen, strict=True):
        one.run_with(option.budget)
    padding, context, _ = classes.shares() if classes else (0.0, 0.0, 1.0)
    return Plan(
        tolerance=tolerance,
        loss_increase=found.divergence,
        gradient_cosine=found.cosine,
        step_ms=1000 * step_seconds,
        planning_seconds=time.perf_counter() - started,
        padding_share=padding,
        context_share=context,
        tokens=classes.tokens if classes else measured[0].tokens,
        dtype=measured[0].dtype,
        device=mlps[0].output.weight.device.type,
        tile_size=config.tile_size,
        tile_order=config.tile_order,
        layers=tuple(one.planned(option) for one, option in zip(measured, chosen, strict=True)),
    )


def _choose(
    measured: Sequence[MeasuredMLP], reference: DenseReference, tolerance: float
) -> tuple[list[Option], Fidelity]:
    """An option for each MLP, which together are faithful enough: that is measured, and returned."""
    least_cosine = max(0.0, 1 - COSINE_PER_TOLERANCE * tolerance)

    def spent(found: Fidelity) -> float:
        """Share of what may be lost."""
        return max(found.divergence / tolerance, found.lost / (1 - least_cosine**2))

    def run(budgets: Sequence[Budget]) -> Fidelity:
        for one, budget in zip(measured, budgets, strict=True):
            one.run_with(budget)
        return reference.fidelity()

    forward = _price(measured, MeasuredMLP.forward_cost, [_middle(one) for one in measured], run, spent)
    backward = _price(measured, MeasuredMLP.backward_cost, [Budget(gradient=_PROBED_SHARE)] * len(measured), run, spent)
    options = [
        undominated(
            [
                Option(
                    budget, one.ms(budget), forward * one.forward_cost(budget) + backward * one.backward_cost(budget)
                )
                for budget in one.budgets()
            ]
        )
        for one in measured
    ]
    best = [Option(Budget(), one.ms(Budget()), 0.0) for one in measured]
    best_found, allowance = Fidelity(0.0, 1.0, 0.0), 1.0
    for _ in range(_ROUNDS):
        chosen = allocate(options, allowance)
        found = run([option.budget for option in chosen])
        used = spent(found)
        logger.info(f"planning: {_milliseconds(chosen):.0f} ms of MLPs at {found}")
        if used <= 1 and _milliseconds(chosen) <= _milliseconds(best):
            best, best_found = chosen, found
        fastest = all(option is of_mlp[0] for option, of_mlp in zip(chosen, options, strict=True))
        if used <= 1 and (fastest or used >= _CLOSE_ENOUGH):
            break
        allowance *= min(3.0, max(0.1, 0.9 / used)) if used else 3.0
    return best, best_found


def _price(
    measured: Sequence[MeasuredMLP],
    cost: Callable[[MeasuredMLP, Budget], float],
    budgets: Sequence[Budget],
    run: Callable[[Sequence[Budget]], Fidelity],
    spent: Callable[[Fidelity], float],
) -> float:
    """What a unit of a cost spends of what may be lost, found by running with some budgets."""
    total = sum(cost(one, budget) for one, budget in zip(measured, budgets, strict=True))
    return spent(run(budgets)) / total if total > 0 else 0.0


def _middle(measured: MeasuredMLP) -> Budget:
    """Half of the neurons, of context tokens if there are any."""
    name: TokenClass = "context" if "context" in measured.classes else "predicted"
    ks = [k for k in measured.classes[name].ks if k]
    return _only(name, ks[len(ks) // 2]) if ks else Budget()


def _only(token_class: TokenClass, k: int) -> Budget:
    return Budget(predicted=k) if token_class == "predicted" else Budget(context=k)


def _timed_counts(mlp: SparseMLP, token_class: TokenClass) -> list[int]:
    """Numbers of neurons of a class that are timed: two, and none."""
    counts = neuron_counts(mlp.index.neurons)
    return ([0] if token_class == "context" else []) + [counts[len(counts) // 4], counts[-2 if len(counts) > 2 else -1]]


def _timed(mlp: SparseMLP, call: MLPCall, classes: Mapping[TokenClass, ClassMeasurements]) -> tuple[MLPTiming, float]:
    """Times of an MLP, and the share of the rows that passed gradients in the timed pass."""
    budgets = [Budget(), Budget(gradient=_PROBED_SHARE)]
    budgets += [_only(name, k) for name in classes for k in _timed_counts(mlp, name)]
    autocast = call.x.dtype != mlp.output.weight.dtype
    mlp.corrections = {name: next(iter(measured.corrections.values())) for name, measured in classes.items()}
    with torch.autocast(call.x.device.type, dtype=call.x.dtype, enabled=autocast):
        return time_mlp(mlp, call, budgets), _kept(call.energy)[_PROBED_SHARE]


def _kept(energy: Tensor) -> dict[float, float]:
    """By share of the squared gradient, the share of the rows with any gradient that hold it."""
    ordered = energy.sort(descending=True).values
    held, rows = ordered.cumsum(0) - ordered, max(1, int((ordered > 0).sum()))
    return {share: int(((held < share * ordered.sum()) & (ordered > 0)).sum()) / rows for share in GRADIENT_SHARES}


def _judged(
    classes: Mapping[TokenClass, ClassMeasurements], calls: Sequence[MLPCall]
) -> dict[TokenClass, ClassMeasurements]:
    """Judge each class on what its MLP saw of another batch; classes that have no tokens there are dropped."""
    kept: dict[TokenClass, ClassMeasurements] = {}
    for name, measured in classes.items():
        found = [(call, rows[name]) for call in calls if name in (rows := call.rows())]
        if found:
            measured.judge(
                torch.cat([call.tokens[rows] for call, rows in found]),
                torch.cat([call.energy[rows] for call, rows in found]),
            )
            kept[name] = measured
    return kept


def _recorded(
    model: nn.Module, runtime: Runtime, mlps: Sequence[SparseMLP], batches: Sequence[Batch]
) -> dict[str, list[MLPCall]]:
    """What every MLP sees of some batches, in dense passes without gradients."""
    shape = tuple(batches[0]["input_ids"].shape) if isinstance(batches[0].get("input_ids"), Tensor) else "?"
    logger.info(f"Calibrating {len(mlps)} MLPs on {len(batches)} batches of {shape} tokens")
    if runtime.skips_padding is None:
        runtime.try_skipping_padding(model, batches[0])
    with recording(model, mlps) as seen:
        for batch in batches:
            model(**batch)
    return dict(seen)


def _fit_budget(mlp: SparseMLP, calls: Sequence[MLPCall]) -> dict[TokenClass, Compensation]:
    """Fit an MLP's index, and the corrections of its budget."""
    by_class = tokens_by_class(calls)
    mlp.index.fit(torch.cat(list(by_class.values())))
    if mlp.budget.predicted == mlp.budget.context:  # treated alike, in the same tiles
        by_class = {"predicted": torch.cat(list(by_class.values()))}
    found: dict[TokenClass, Compensation] = {}
    for name, tokens in by_class.items():
        if (k := mlp.budget.neurons(name)) is not None:
            measured = ClassMeasurements(mlp, [k])
            measured.fit(tokens)
            measured.solve()
            found[name] = measured.corrections[k]
    return found


def _milliseconds(options: Sequence[Option]) -> float:
    return sum(option.ms for option in options)


def _no_autocast(mlps: Sequence[SparseMLP]) -> torch.autocast:
    return torch.autocast(mlps[0].output.weight.device.type, enabled=False)


def _adopt(mlps: Sequence[SparseMLP], fitted: Sequence[tuple[Sketch, Tensor | None, Corrections]]) -> None:
    """Give each MLP the sketch, the tokens that it was fitted to, and the corrections that were found for it."""
    for mlp, (sketch, tokens, corrections) in zip(mlps, fitted, strict=True):
        mlp.index.adopt(sketch, tokens)
        mlp.corrections = dict(corrections)


@contextmanager
def _restored(mlps: Sequence[SparseMLP]) -> Iterator[None]:
    """Afterwards budgets, corrections and indices are as they were."""
    with ExitStack() as stack:
        for mlp in mlps:
            stack.enter_context(mlp.using(mlp.budget, mlp.corrections))
            stack.enter_context(mlp.index.restored())
        yield
