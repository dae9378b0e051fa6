"""Replaces a model's MLP projections by sparse ones, and restores them."""

import hashlib
from typing import TypeVar

import torch
from torch import nn
from transformers.utils import logging

from ..config import SubquadConfig
from ..errors import AlreadyPatchedError, PlanError
from ..head.patch_head import unpatch_automatic_head
from ..index.choose_neurons import ActivationIndex
from ..layers.attention_patch import restore_attention
from ..layers.batch_hook import unwatch_batches, watch_batches
from ..layers.budget import Budget
from ..layers.patched_mlps import patched_parts, require_patched, require_whole, sparse_mlps
from ..layers.peft_and_checkpointing import Surroundings
from ..layers.shared_state import Runtime
from ..layers.sparse_mlp import InputProjection, OutputProjection, SparseMLP
from ..logs import get_logger
from ..plan import Plan
from .mlp_patterns import Match, bare_model, cannot_be_patched, find_activations, find_mlps
from .self_test import self_test
from .validation import check_not_shared, check_projections

ModelT = TypeVar("ModelT", bound=nn.Module)

logger = get_logger(__name__)


def patch_model(model: ModelT, config: SubquadConfig | None = None, plan: Plan | None = None) -> ModelT:
    """Make a model's wide MLPs sparse, in place. Call it before creating the `Trainer` or the optimizer.

    The patched base weights and biases are frozen, and their low-rank updates are trainable. Every other parameter
    is unchanged, and saved checkpoints are plain. If a weight was frozen before the patch, its update is frozen, too,
    unless PEFT froze the weight or the whole model was frozen.

    Args:
        plan: the budget of each MLP, from `calibrate` with the same config. Without a plan, `SubquadCallback` makes one
            at the start of training, unless the config fixes `active`.

    Returns:
        The same model.

    Raises:
        AlreadyPatchedError: the model is patched.
        NoMatchError: no MLP matches the config.
        UnsupportedModuleError: an MLP is quantised (other than to 4 bits by bitsandbytes), wrapped (by PEFT, say), or
            not elementwise between its projections.
        WeightsError: weights hold NaN or infinite values.
        ConfigError: `active` or `rank` exceeds a layer, or updates would be folded into weights in 4 bits.
        BackendError: the config asks for a backend that is not installed.
        PlanError: the plan is for other MLPs or other tiles.
        In each case the model is unchanged.
    """
    config = config or SubquadConfig()
    if sparse_mlps(model):
        raise AlreadyPatchedError("the model is patched already: call unpatch_model(model) first to patch it again")
    matches = find_mlps(model, config)
    for match in matches:
        check_projections(match, config)
    bare = bare_model(model)
    check_not_shared(bare, matches)
    left_out = cannot_be_patched(bare)
    runtime = Runtime(config, Surroundings(bare))
    keep_frozen = not hasattr(model, "peft_config") and any(p.requires_grad for p in model.parameters())
    patched: list[SparseMLP] = []
    try:
        for match in logging.tqdm(matches, desc="Activation index", unit="layer", delay=1):  # shown after a second
            mlp = _patch_one(match, runtime, keep_frozen)
            patched.append(mlp)
            with torch.autocast(mlp.output.weight.device.type, enabled=False):  # whose rounding would fail the test
                self_test(mlp, find_activations(match))
        watch_batches(model, runtime)
        if plan is not None:
            apply_plan(model, plan)
    except BaseException:
        unwatch_batches(model)
        for mlp in patched:
            _restore(mlp)
        raise
    if left_out:
        logger.info(left_out)
    return model


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Set the budget of every MLP of a patched model.

    Raises:
        NotPatchedError: the model is not patched.
        PlanError: the plan is for other MLPs or other tiles. Budgets are unchanged.
    """
    runtime, mlps = patched_parts(model)
    wanted = [(layer.name, layer.neurons) for layer in plan.layers]
    found = [(mlp.name, mlp.index.neurons) for mlp in mlps]
    if wanted != found:
        odd = sorted(set(wanted) ^ set(found))[:4]
        raise PlanError(
            f"the plan is for {len(wanted)} MLPs, the model is patched at {len(found)}, and they differ in "
            f"{', '.join(f'{name} of {neurons} neurons' for name, neurons in odd) or 'their order'}: calibrate the "
            "patched model, with the same config"
        )
    config = runtime.config
    if (plan.tile_size, plan.tile_order) != (config.tile_size, config.tile_order):
        raise PlanError(
            f"the plan was measured with tiles of {plan.tile_size} {plan.tile_order} tokens, the config has "
            f"{config.tile_size} {config.tile_order}: calibrate with the same config"
        )
    before = [(mlp.budget.predicted, mlp.budget.context) for mlp in mlps]
    for mlp, layer in zip(mlps, plan.layers, strict=True):
        mlp.set_budget(Budget(layer.predicted, layer.context, layer.gradient))
    if before != [(mlp.budget.predicted, mlp.budget.context) for mlp in mlps]:
        for mlp in mlps:
            mlp.corrections = {}  # they stand in for other neurons
    runtime.plan = plan


def unpatch_model(model: ModelT) -> ModelT:
    """Undo `patch_model`, in place: restore the original modules, with the updates merged into their weights.

    Where no update was trained, the weights are bit-identical to those before the patch.

    Raises:
        NotPatchedError: the model is not patched.
        ParallelismError: FSDP holds its weights in shards.
        PatchError: updates of weights in 4 bits were trained, which cannot be merged into them. The model is unchanged.
    """
    mlps = require_patched(model)
    require_whole(mlps)
    trained = [p for mlp in mlps for p in mlp.projections if p.quantization is None or not p.update.is_zero()]
    for projection in sorted(trained, key=lambda projection: projection.quantization is None):  # what can fail first
        projection.set_rows(projection.merged_rows())
    for mlp in mlps:
        _restore(mlp)
    unwatch_batches(model)
    restore_attention(model)
    unpatch_automatic_head(model)  # of a training that was broken off
    return model


def _patch_one(match: Match, runtime: Runtime, keep_frozen: bool) -> SparseMLP:
    """Replace one MLP's projections. What can fail comes before the first replacement."""
    config = runtime.config
    sources = {path: match.projection(path) for path in match.paths}
    seeds = {path: _derived_seed(config.seed, match.full_name(path)) for path in sources}
    *into, out_of = sources
    inputs = [InputProjection(sources[path], runtime, seeds[path]) for path in into]
    output = OutputProjection(sources[out_of], runtime, seeds[out_of])
    index = ActivationIndex(match.name, inputs, output, find_activations(match)[0], match.gated, config)
    mlp = SparseMLP(match.name, match.parent, inputs, output, index, runtime, sources)
    for (path, source), projection in zip(sources.items(), mlp.projections, strict=True):
        projection.train(source.training)
        projection.kept_frozen = keep_frozen and not projection.weight.requires_grad
        projection.update.requires_grad_(not projection.kept_frozen)
        source._parameters.update(dict.fromkeys(source._parameters))  # so that whole weights go when FSDP splits them
        for parameter in (projection.weight, projection.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        match.parent.set_submodule(path, projection)
    return mlp


def _restore(mlp: SparseMLP) -> None:
    for (path, source), projection in zip(mlp.sources.items(), mlp.projections, strict=True):
        source.train(projection.training)
        for name, trainable in projection.trainable.items():
            parameter = getattr(projection, name)  # `model.to` may have replaced it
            setattr(source, name, parameter.requires_grad_(trainable))
        mlp.parent.set_submodule(path, source)


def _derived_seed(seed: int, name: str) -> int:
    """A seed for the factors of one projection: 56 bits, which leaves room to count restarts up."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
