"""Weights that FSDP2 (`fully_shard`) keeps in shards: whole for a while, outside of a forward pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_shard(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`, of which this process holds a part."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from all ranks, which must all call this; a plain tensor is returned as it is."""
    shard: Any = tensor
    return shard.detach().full_tensor() if is_shard(tensor) else tensor


def split_like(values: Tensor, shard: Any) -> Any:
    """The part of `values`, which all ranks have, that a shard of the same shape holds, as such a shard."""
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * shard.device_mesh.ndim
    return DTensor.from_local(values, shard.device_mesh, everywhere, run_check=False).redistribute(
        placements=shard.placements
    )


@contextmanager
def gathered(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Context manager: inside, sharded parameters of the modules are whole and plain, as in a forward pass.

    What is written into them is written back to the shards. All ranks must enter with the same modules, and write the
    same values. Without shards nothing changes, and no rank waits.
    """
    held = []
    for module in (part for root in modules for part in root.modules()):
        for name, shard in module._parameters.items():
            if shard is not None and is_shard(shard):
                plain = nn.Parameter(whole(shard), requires_grad=shard.requires_grad)
                held.append((module, name, shard, plain, plain._version))
    for module, name, _, plain, _ in held:
        module._parameters[name] = plain
    try:
        yield
    finally:
        for module, name, shard, plain, version in held:
            module._parameters[name] = shard
            if plain._version != version:
                with torch.no_grad():
                    shard.copy_(split_like(plain.detach(), shard))


def is_fsdp(kind: type) -> bool:
    """Whether a module's class is one that `fully_shard` gave it."""
    return hasattr(kind, "unshard")


def reshard(model: nn.Module) -> None:
    """Go back to shards where FSDP2 keeps whole weights between passes, as after an evaluation."""
    for module in model.modules():
        if is_fsdp(type(module)):
            fsdp: Any = module
            fsdp.reshard()
