"""Half-space reporting with faiss: all rows whose inner product with a query reaches a threshold."""

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True)
class Report:
    """Neurons reported for N tokens, in compressed sparse row (CSR) form.

    Attributes:
        starts: int64 [N + 1]; token i has entries starts[i] to starts[i + 1].
        neurons: int64 [entries], ascending within a token.
        values: float32 [entries], the inner products.
    """

    starts: Tensor
    neurons: Tensor
    values: Tensor

    def of(self, token: int) -> Tensor:
        """Neurons reported for one token."""
        return self.neurons[self.starts[token] : self.starts[token + 1]]


def empty_index(columns: int, factory: str) -> Any:
    """A faiss inner-product index that holds nothing yet.

    Raises:
        ConfigError: faiss does not support this index, or not with this number of columns.
    """
    try:
        return faiss.index_factory(columns, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(f"index_factory={factory!r} cannot be made by faiss: {_reason(error)}") from error


class ReportingIndex:
    """A faiss inner-product index over rows [m, c], on the CPU.

    Args:
        factory: faiss factory string, such as "Flat", "IVF64,Flat" or "HNSW32".

    Raises:
        ConfigError: faiss cannot make such an index over these rows.
    """

    def __init__(self, rows: Tensor, factory: str) -> None:
        self.rows = rows.detach().float().cpu().contiguous()
        self.index = empty_index(self.rows.shape[1], factory)
        try:
            if not self.index.is_trained:
                self.index.train(self.rows.numpy())
            self.index.add(self.rows.numpy())
        except RuntimeError as error:
            raise ConfigError(
                f"index_factory={factory!r} does not work for {len(rows)} neurons: {_reason(error)}"
            ) from error

    def report(self, queries: Tensor, threshold: float) -> Report:
        """Rows j with <row_j, query> >= threshold, ties included, for each of the queries [N, c].

        faiss proposes candidates, with a margin for its own rounding; their inner products are then computed and
        compared here. A flat index therefore agrees with brute force.
        """
        queries = queries.detach().float().cpu().contiguous()
        sizes = queries.norm(dim=1)
        sizes = sizes[sizes.isfinite()]  # the others report what reaches the threshold anyway, NaN nothing
        reach = sizes.max().item() * self.rows.norm(dim=1).max().item() if len(sizes) else 0.0
        margin = 1e-5 * max(reach, abs(threshold)) + np.finfo(np.float32).tiny
        try:
            limits, _, found = self.index.range_search(queries.numpy(), float(threshold - margin))
        except RuntimeError as error:
            raise ConfigError(
                f"this index_factory has no range search, choose another such as 'Flat': {_reason(error)}"
            ) from error
        token = torch.repeat_interleave(torch.from_numpy(np.diff(limits.astype(np.int64))))
        neurons = torch.from_numpy(found.astype(np.int64))
        values = (queries[token] * self.rows[neurons]).sum(1)
        order = torch.argsort(token * len(self.rows) + neurons)
        order = order[values[order] >= threshold]
        counts = torch.bincount(token[order], minlength=len(queries))
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Report(starts, neurons[order], values[order])


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
