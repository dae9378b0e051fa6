"""Batches of a Trainer's own data, without moving its dataloader or its random states."""

import copy
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, IterableDataset


def sample_batches(dataloader: DataLoader[Any], rows: int, count: int, device: torch.device) -> list[Any]:
    """Collated batches of rows spread evenly over the dataset, on a device.

    Returns:
        None at all if the dataset can only be iterated, which would use it up; fewer than `count` if it is that short.
    """
    dataset: Any = dataloader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not len(dataset):
        return []
    count = max(1, min(count, len(dataset) // rows))
    total = min(count * rows, len(dataset))
    collate = _copied(dataloader.collate_fn)
    chosen = [dataset[i * len(dataset) // total] for i in range(total)]
    return [send_to_device(collate(chosen[first::count]), device) for first in range(count)]


def _copied(collate: Any) -> Any:
    """A copy of a collator, which may hold a random state of its own; a model that it holds is not copied."""
    memo: dict[int, Any] = {}
    held = [collate]
    for _ in range(3):  # the Trainer may wrap the user's collator
        held = [value for thing in held for value in getattr(thing, "__dict__", {}).values()]
        memo |= {id(value): value for value in held if isinstance(value, nn.Module)}
    return copy.deepcopy(collate, memo)
