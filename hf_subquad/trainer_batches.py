"""A batch of a Trainer's own data, without moving its dataloader or its random states."""

import copy
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, IterableDataset


def sample_batch(dataloader: DataLoader[Any], rows: int, device: torch.device) -> Any | None:
    """A collated batch of rows spread evenly over the dataset, on a device.

    Returns:
        None if the dataset can only be iterated, which would use it up.
    """
    dataset: Any = dataloader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not len(dataset):
        return None
    rows = min(rows, len(dataset))
    collate = copy.deepcopy(dataloader.collate_fn)  # it may hold a random state of its own
    return send_to_device(collate([dataset[i * len(dataset) // rows] for i in range(rows)]), device)
