"""Batches of a Trainer's own data, without advancing its dataloader or its random states."""

import copy
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..errors import CalibrationError


def sample_batches(dataloader: Any, rows: int, count: int, device: torch.device) -> list[Mapping[str, Any]]:
    """Collated batches of rows spread evenly over the dataset, on a device; fewer than `count` if the dataset is short.
    If all have an attention mask, the one with the median share of padding (of two, the lower one) comes last: on it,
    plans are timed and judged.

    Of Hugging Face's iterable datasets they are the first rows, because training restarts them.

    Args:
        dataloader: a `DataLoader`, or a sequence of batches.

    Raises:
        CalibrationError: reading from the dataset would consume it, or a batch is not a dict of keyword arguments.
    """
    batches = _items(dataloader, count) if isinstance(dataloader, Sequence) else _collated(dataloader, rows, count)
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise CalibrationError(f"a batch is a {type(batch).__name__}, not a dict of the model's arguments")
    if not batches:
        raise CalibrationError("the dataset is empty")
    return [send_to_device(batch, device) for batch in _typical_last(batches)]


def _typical_last(batches: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    masks = [mask for batch in batches if isinstance(mask := batch.get("attention_mask"), Tensor)]
    if len(masks) < len(batches):
        return batches
    by_padding = sorted(range(len(batches)), key=lambda i: masks[i].float().mean().item())
    typical = by_padding[len(batches) // 2]
    return [*batches[:typical], *batches[typical + 1 :], batches[typical]]


def _collated(dataloader: Any, rows: int, count: int) -> list[Any]:
    dataset: Any = getattr(dataloader, "dataset", dataloader)
    while isinstance(dataset, IterableDataset) and isinstance(getattr(dataset, "dataset", None), IterableDataset):
        dataset = cast("Any", dataset).dataset  # one process's share of it
    collate = _copied(dataloader.collate_fn) if hasattr(dataloader, "collate_fn") else None
    if getattr(dataloader, "batch_size", rows) is None and getattr(dataloader, "batch_sampler", None) is None:
        # each item is a batch
        items = _items(dataset, count)
        return [collate(item) for item in items] if collate else items
    if collate is None:
        raise CalibrationError(f"the dataloader is a {type(dataloader).__name__} without collate_fn")
    if hasattr(dataset, "__len__"):
        count = max(1, min(count, len(dataset) // rows))
    chosen = _items(dataset, rows * count)
    count = max(1, min(count, len(chosen) // rows))
    return [collate(chosen[first::count]) for first in range(count) if chosen]


def _items(dataset: Any, count: int) -> list[Any]:
    """So many items spread over a dataset, or all of a shorter one."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        if not hasattr(dataset, "take"):  # as those of Hugging Face have
            raise CalibrationError("the dataset can only be iterated, and may not be restartable")
        return list(islice(dataset.take(count), count))
    count = min(count, len(dataset))
    return [dataset[i * len(dataset) // count] for i in range(count)]


def _copied(collate: Any) -> Any:
    """A copy of a collator, which may hold its own random state, but not of a model that it holds. The collator itself,
    if it cannot be copied (it holds a lock, a file, ...)."""
    memo: dict[int, Any] = {}
    held = [collate]
    for _ in range(3):  # the Trainer may wrap the user's collator
        held = [value for thing in held for value in getattr(thing, "__dict__", {}).values()]
        memo |= {id(value): value for value in held if isinstance(value, nn.Module)}
    try:
        return copy.deepcopy(collate, memo)
    except Exception:  # whatever its parts raise
        return collate
