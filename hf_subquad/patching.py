"""Swap a model's MLP projections for sparse ones, and back."""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .config import SubquadConfig
from .errors import (
    AlreadyPatchedError,
    ConfigError,
    NotPatchedError,
    PatchError,
    PlanError,
    UnsupportedModuleError,
    WeightsError,
)
from .families import Match, find_activations, find_mlps, linear_sizes
from .index import ActivationIndex
from .layers import Forward, InputProjection, OutputProjection, Runtime, SparseMLP
from .plan import Plan
from .self_test import self_test

ModelT = TypeVar("ModelT", bound=nn.Module)

_SHOW_PROGRESS_FROM = 50_000_000  # patched parameters: about a second of work
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TRIED_TOKENS = 3
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def patch_model(model: ModelT, config: SubquadConfig | None = None, plan: Plan | None = None) -> ModelT:
    """Make a model's wide MLPs sparse, in place. Call it before the `Trainer` or the optimizer is made.

    The patched base weights and biases are frozen, their low-rank updates are trainable; every other parameter
    stays as it is. Saved checkpoints stay plain.

    Args:
        plan: budgets by MLP, from `calibrate` with the same config. Without one, `SubquadCallback` makes it at the
            start of training, unless the config fixes `active`.

    Returns:
        The same model.

    Raises:
        AlreadyPatchedError: the model is patched.
        NoMatchError: there is no MLP as asked for.
        UnsupportedModuleError: an MLP is quantised, wrapped (by PEFT, say), or not elementwise in its middle.
        WeightsError: weights hold NaN or infinite values.
        ConfigError: `active` or `rank` exceeds a layer.
        PlanError: the plan is for other MLPs or other tiles.
        In each case the model is as it was.
    """
    config = config or SubquadConfig()
    if sparse_mlps(model):
        raise AlreadyPatchedError("the model is patched already: call unpatch_model(model) first to patch it anew")
    matches = find_mlps(model, config)
    for match in matches:
        _check(match, config)
    size = sum(match.projection(path).weight.numel() for match in matches for path in match.paths)
    runtime = Runtime(config)
    patched: list[SparseMLP] = []
    try:
        progress = logging.tqdm(matches, desc="Activation index", unit="layer", disable=size < _SHOW_PROGRESS_FROM)
        for match in progress:
            mlp = _patch_one(match, runtime)
            patched.append(mlp)
            with torch.autocast(mlp.output.weight.device.type, enabled=False):  # whose rounding would fail the test
                self_test(mlp, find_activations(match))
        if plan is not None:
            apply_plan(model, plan)
    except BaseException:
        for mlp in patched:
            _restore(mlp)
        raise
    return model


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Give every MLP of a patched model its budget.

    Raises:
        NotPatchedError: the model is not patched.
        PlanError: the plan is for other MLPs or other tiles. Budgets are as they were.
    """
    check_plan(model, plan)
    runtime, mlps = patched_parts(model)
    for mlp, layer in zip(mlps, plan.layers, strict=True):
        mlp.set_active(layer.active)
    runtime.plan = plan


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raises what `apply_plan` would, and changes nothing."""
    runtime, mlps = patched_parts(model)
    wanted = [(layer.name, layer.neurons) for layer in plan.layers]
    found = [(mlp.bare_name, mlp.index.neurons) for mlp in mlps]
    if wanted != found:
        odd = sorted(set(wanted) ^ set(found))[:4]
        raise PlanError(
            f"the plan is for {len(wanted)} MLPs, the model is patched at {len(found)}, and they differ in "
            f"{', '.join(f'{name} of {neurons} neurons' for name, neurons in odd) or 'their order'}: calibrate the "
            "model that is patched, with the same config"
        )
    config = runtime.config
    if (plan.tile_size, plan.tile_order) != (config.tile_size, config.tile_order):
        raise PlanError(
            f"the plan was measured with tiles of {plan.tile_size} {plan.tile_order} tokens, the config has "
            f"{config.tile_size} {config.tile_order}: calibrate with the same config"
        )


def unpatch_model(model: ModelT) -> ModelT:
    """Undo `patch_model`, in place: the original modules return, with live updates merged into their weights.

    Bit-equal to the model before the patch where no update was trained.

    Raises:
        NotPatchedError: the model is not patched.
    """
    for mlp in require_patched(model):
        for projection in mlp.projections:
            projection.set_rows(projection.live_rows())
        _restore(mlp)
    return model


def sparse_mlps(model: nn.Module) -> list[SparseMLP]:
    """The sparse MLPs of a model, also of one wrapped by PEFT or DDP, in the model's order; empty if unpatched."""
    # Runs in every step: `model.modules()`, which makes names too, takes several times as long.
    found, waiting, seen = [], [model], set()
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, OutputProjection):
            found.append(module.mlp)
        waiting.extend(child for child in reversed(module._modules.values()) if child is not None)
    return found


def require_patched(model: nn.Module) -> list[SparseMLP]:
    """`sparse_mlps`, or a `NotPatchedError`."""
    mlps = sparse_mlps(model)
    if not mlps:
        raise NotPatchedError(
            f"{type(model).__name__} is not patched: call patch_model(model) before the Trainer is made"
        )
    return mlps


def runtime_of(model: nn.Module) -> Runtime:
    """What the sparse MLPs of a model share.

    Raises:
        NotPatchedError: the model is not patched.
        PatchError: its parts were patched one by one, so there is no one schedule to follow.
    """
    return _shared_runtime(model, require_patched(model))


def patched_parts(model: nn.Module) -> tuple[Runtime, list[SparseMLP]]:
    """`runtime_of` and `require_patched` in one search of the model."""
    mlps = require_patched(model)
    return _shared_runtime(model, mlps), mlps


def _shared_runtime(model: nn.Module, mlps: list[SparseMLP]) -> Runtime:
    runtimes = {id(mlp.runtime): mlp.runtime for mlp in mlps}
    if len(runtimes) > 1:
        raise PatchError(
            f"{type(model).__name__} was patched in {len(runtimes)} parts (or copied in parts by PEFT's "
            "modules_to_save): unpatch it and patch the whole model once, choosing layers with layers_to_transform"
        )
    return next(iter(runtimes.values()))


def dense_forward(model: nn.Module) -> AbstractContextManager[None]:
    """Context manager: all MLPs run dense (base and live updates), whatever the mode of the model."""
    return _forced(model, "dense")


def sparse_forward(model: nn.Module) -> AbstractContextManager[None]:
    """Context manager: all patched MLPs run sparse, in evaluation too."""
    return _forced(model, "sparse")


@contextmanager
def _forced(model: nn.Module, forward: Forward) -> Iterator[None]:
    before = [(mlp.runtime, mlp.runtime.forward) for mlp in require_patched(model)]
    for runtime, _ in before:
        runtime.forward = forward
    try:
        yield
    finally:
        for runtime, previous in before:
            runtime.forward = previous


def _check(match: Match, config: SubquadConfig) -> None:
    for path in match.paths:
        module, name = match.projection(path), match.full_name(path)
        if hasattr(module, "base_layer"):
            raise UnsupportedModuleError(
                f"{name} is wrapped by PEFT ({type(module).__name__}): leave the MLP's projections out of PEFT's "
                "target_modules, or out of the patch; their updates would meet"
            )
        dtype = getattr(getattr(module, "weight", None), "dtype", "no weight")
        if not isinstance(module, nn.Linear | Conv1D) or dtype not in _FLOATS:
            raise UnsupportedModuleError(
                f"{name} is a {type(module).__name__} of {dtype}: only plain nn.Linear and Conv1D projections in "
                "floating point can be patched; load the model unquantised, or leave the MLP out with target_modules "
                "or layers_to_transform"
            )
        if "forward" in vars(module) or any(vars(module)[hooks] for hooks in _HOOKS):
            raise UnsupportedModuleError(
                f"{name} has a forward hook or a forward of its own (device_map offloading? pruning?), which the patch "
                "would drop: remove it (prune.remove), or load the model without device_map"
            )
        if hasattr(module.weight, "device_mesh") or hasattr(module.weight, "ds_id"):  # DTensor's, DeepSpeed's
            raise UnsupportedModuleError(
                f"{name} is split over processes (tensor parallelism, FSDP2 or DeepSpeed ZeRO-3), and choosing neurons "
                "needs whole rows: load the model whole on every process, and train with plain data parallelism (DDP)"
            )
        if type(module.weight) is not nn.Parameter:
            raise UnsupportedModuleError(
                f"{name} holds its weight as a {type(module.weight).__name__}, not as a plain parameter (quantised, "
                "sharded, computed?): patch the model before that, or make parametrizations permanent"
            )
        if module.weight.is_meta or module.weight.dim() != 2:
            raise UnsupportedModuleError(
                f"{name} has no weights yet (meta device, or DeepSpeed ZeRO-3): load them before patching"
            )
        for kind in ("weight", "bias"):
            values = getattr(module, kind)
            if values is not None and not torch.isfinite(values).all():
                raise WeightsError(f"{name}.{kind} holds NaN or infinite values: the checkpoint is damaged")
        if type(module) not in (nn.Linear, Conv1D) and not _computes_linear(module):
            raise UnsupportedModuleError(
                f"{name} is a {type(module).__name__}, which does not compute x W^T + b: only what nn.Linear computes "
                "can be patched"
            )
        if config.rank > min(module.weight.shape):
            raise ConfigError(f"rank={config.rank} exceeds {name}, which is {tuple(module.weight.shape)}")
    config.active_neurons(match.neurons)


@torch.no_grad()
def _computes_linear(module: nn.Module) -> bool:
    """Whether a subclass of Linear or Conv1D computes the same, on random input."""
    weight = module.get_parameter("weight")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TRIED_TOKENS, linear_sizes(module)[0], generator=generator).to(weight)
    bias: torch.Tensor | None = getattr(module, "bias", None)
    expected = F.linear(x, weight.t() if isinstance(module, Conv1D) else weight, bias)
    try:
        difference = (module(x) - expected).abs()
    except Exception:
        return False
    tolerance = 4 * torch.finfo(x.dtype).eps * x.shape[1] ** 0.5 * expected.abs().amax()
    return difference.shape == expected.shape and bool((difference <= tolerance).all())


def _patch_one(match: Match, runtime: Runtime) -> SparseMLP:
    """Swap one MLP's projections. All that can fail comes before the first swap, and is undone."""
    config = runtime.config
    sources = {path: match.projection(path) for path in match.paths}
    seeds = {path: _derived_seed(config.seed, match.full_name(path)) for path in sources}
    inputs = [InputProjection(sources[path], config, seeds[path]) for path in match.family.inputs]
    output = OutputProjection(sources[match.family.output], config, seeds[match.family.output])
    inputs[0].stacked = match.gate == "stacked"
    for projection in (*inputs, output):
        projection.store_by_neuron()
    try:
        index = ActivationIndex(match.name, inputs, output, find_activations(match)[0], match.gate != "none", config)
        mlp = SparseMLP(match.name, match.parent, inputs, output, index, runtime, sources)
    except BaseException:
        for projection in (*inputs, output):
            projection.store_as_saved()
        raise
    for (path, source), projection in zip(sources.items(), mlp.projections, strict=True):
        projection.train(source.training)
        for parameter in (projection.weight, projection.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        _place(match.parent, path, projection)
    return mlp


def _restore(mlp: SparseMLP) -> None:
    for (path, source), projection in zip(mlp.sources.items(), mlp.projections, strict=True):
        projection.store_as_saved()
        source.weight, source.bias = projection.weight, projection.bias  # `model.to` may have replaced them
        source.train(projection.training)
        for name, trainable in mlp.trainable[path].items():
            getattr(source, name).requires_grad_(trainable)
        _place(mlp.parent, path, source)


def _derived_seed(seed: int, name: str) -> int:
    """A seed for the factors of one projection: 56 bits, which leaves room to count restarts up."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def _place(parent: nn.Module, path: str, module: nn.Module) -> None:
    holder, _, name = path.rpartition(".")
    setattr(parent.get_submodule(holder), name, module)
