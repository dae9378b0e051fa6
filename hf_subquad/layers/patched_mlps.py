"""Finds the sparse MLPs of a model, and the runtime that they share."""

from collections.abc import Sequence

from torch import nn

from ..errors import NotPatchedError, ParallelismError, PatchError
from ..weights.shards import is_fsdp, is_shard, reshard
from .shared_state import Runtime
from .sparse_mlp import OutputProjection, SparseMLP


def sparse_mlps(model: nn.Module) -> list[SparseMLP]:
    """The sparse MLPs of a model (also if wrapped by PEFT or DDP), in the model's order; empty if it is unpatched."""
    return [module.mlp for module in model.modules() if isinstance(module, OutputProjection)]


def require_patched(model: nn.Module) -> list[SparseMLP]:
    """Like `sparse_mlps`, but raises a `NotPatchedError` if there are none."""
    mlps = sparse_mlps(model)
    if not mlps:
        raise NotPatchedError(
            f"{type(model).__name__} is not patched: call patch_model(model) before creating the Trainer"
        )
    return mlps


def runtime_of(model: nn.Module) -> Runtime:
    """The runtime that the sparse MLPs of a model share; raises the errors of `patched_parts`."""
    return patched_parts(model)[0]


def patched_parts(model: nn.Module) -> tuple[Runtime, list[SparseMLP]]:
    """The runtime that the sparse MLPs of a model share, and the MLPs.

    Raises:
        NotPatchedError: the model is not patched.
        PatchError: its parts were patched separately, so they have no common schedule.
    """
    mlps = require_patched(model)
    runtimes = {id(mlp.runtime) for mlp in mlps}
    if len(runtimes) > 1:
        raise PatchError(
            f"{type(model).__name__} was patched in {len(runtimes)} parts (or copied in parts by PEFT's "
            "modules_to_save): unpatch it and patch the whole model once, choosing layers with layers_to_transform"
        )
    return mlps[0].runtime, mlps


def train_updates(model: nn.Module) -> None:
    """Make the low-rank updates trainable again if PEFT froze everything but its adapters, or if the user froze the
    whole model. Otherwise, or if some updates are trainable, frozen updates stay frozen."""
    mlps = require_patched(model)
    if frozen_with_the_rest(model, mlps):
        for projection in (projection for mlp in mlps for projection in mlp.projections):
            projection.update.requires_grad_(not projection.kept_frozen)


def frozen_with_the_rest(model: nn.Module, mlps: Sequence[SparseMLP]) -> bool:
    """Whether all updates are frozen, and PEFT froze everything but its adapters, or the whole model is frozen."""
    by_others = hasattr(model, "peft_config") or not any(parameter.requires_grad for parameter in model.parameters())
    factors = (factor for mlp in mlps for projection in mlp.projections for factor in projection.update.parameters())
    return by_others and not any(factor.requires_grad for factor in factors)


def require_whole(mlps: Sequence[SparseMLP]) -> None:
    """
    Raises:
        ParallelismError: FSDP holds weights of these MLPs in shards.
    """
    if mlps[0].runtime.sharded or any(is_shard(projection.weight) for mlp in mlps for projection in mlp.projections):
        raise ParallelismError(
            "FSDP holds the weights in shards: calibrate, apply the plan and compensate before fully_shard; instead of "
            "unpatch_model, save the plain model with save_merged and load it"
        )


def settle_shards(runtime: Runtime, mlps: Sequence[SparseMLP]) -> None:
    """Between passes: put weights back into shards, if `fully_shard` was called; the first time, note that it was."""
    model = runtime.surroundings.model
    if not runtime.sharded and (is_shard(mlps[0].output.weight) or is_fsdp(type(model))):
        if any(projection.quantization is not None for mlp in mlps for projection in mlp.projections):
            raise ParallelismError(
                "fully_shard was called on patched MLPs whose weights are in 4 bits, which are read by rows of the "
                "whole weight: train with DDP, or load the model unquantised for FSDP2"
            )
        runtime.sharded = True
        for mlp in mlps:
            mlp.index.compare_weights()
            for projection in mlp.projections:
                projection.drop_copy()
    if runtime.sharded:
        reshard(model)
