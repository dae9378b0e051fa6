"""Batches of a Trainer's own data, without moving its dataloader or its random states."""

import copy
from typing import Any

import torch
from accelerate.utils import send_to_device
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
    collate = copy.deepcopy(dataloader.collate_fn)  # it may hold a random state of its own
    chosen = [dataset[i * len(dataset) // total] for i in range(total)]
    return [send_to_device(collate(chosen[first::count]), device) for first in range(count)]
