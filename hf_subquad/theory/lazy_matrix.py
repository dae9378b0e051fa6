"""Lazy low-rank maintenance: a matrix whose updates stay factored until their total rank exceeds a budget."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError


class LazyMatrix(nn.Module):
    """M = weight + sum of left_i right_i; the products are not formed.

    Updates with the same left factor (the same tensor, not just the same values) share a block: their right factors are
    added, and the rank does not grow. So Gauss-Newton on a fixed training set, whose updates all have the features H as
    left factor, never uses up its budget; mini-batches of other samples do.

    `torch.optim` can train `weight`; pending updates are constants to autograd.

    Args:
        weight: [r, c], used without copying.
        rank_budget: the largest total number of columns of the pending left factors.

    Attributes:
        merges: how often factors were merged into `weight`, at r c multiply-adds per rank.
        changes: number of updates and loads so far; merges do not count, as they do not change M.
    """

    def __init__(self, weight: Tensor, rank_budget: int) -> None:
        super().__init__()
        if rank_budget < 1:
            raise ConfigError(f"rank_budget must be at least 1, got {rank_budget}")
        self.weight = nn.Parameter(weight)
        self.rank_budget = rank_budget
        self.merges = self.changes = 0
        self._blocks: list[tuple[Tensor, Tensor]] = []

    @property
    def pending_rank(self) -> int:
        """Columns of the pending left factors."""
        return sum(left.shape[1] for left, _ in self._blocks)

    @torch.no_grad()
    def append(self, left: Tensor, right: Tensor) -> None:
        """M += left [r, q] right [q, c]. `left` is kept as it is and must not be changed later; `right` is copied.

        Pending updates are merged first if the new one would exceed the budget; a new one that exceeds it alone is
        merged at once.

        Raises:
            ConfigError: the shapes do not fit.
        """
        rows, columns = self.weight.shape
        if left.ndim != 2 or right.ndim != 2 or (len(left), *right.shape) != (rows, left.shape[1], columns):
            raise ConfigError(
                f"factors of a {rows} x {columns} matrix must be [{rows}, q] and [q, {columns}], "
                f"got {list(left.shape)} and {list(right.shape)}"
            )
        self.changes += 1
        for known, waiting in self._blocks:
            if known is left:
                waiting += right
                return
        if self.pending_rank + left.shape[1] > self.rank_budget:
            self.merge()
        self._blocks.append((left, right.clone()))
        if self.pending_rank > self.rank_budget:
            self.merge()

    @torch.no_grad()
    def merge(self) -> None:
        """Add the pending updates to `weight`, at r c multiply-adds per rank."""
        for left, right in self._blocks:
            self.weight.addmm_(left, right)
        self.merges += bool(self._blocks)
        self._blocks.clear()

    def apply_to(self, x: Tensor) -> Tensor:
        """x [N, r] times M: c nnz(x) multiply-adds, and q (r + c) a sample for pending rank q."""
        y = sparse_product(x, self.weight)
        for left, right in self._blocks:
            y = y + (x @ left) @ right
        return y

    def rows(self, index: Tensor) -> Tensor:
        """Rows M[index] [K, c], exact."""
        found = self.weight[index]
        for left, right in self._blocks:
            found = found + left[index] @ right
        return found

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Save `weight` alone, with the pending updates merged into it."""
        self.merge()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Replace the pending updates, too; a load that fails leaves the matrix as it was."""
        self.merge()
        self.changes += 1
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LazyMatrix":
        """Merge the pending updates before a move or a cast."""
        self.merge()
        return super()._apply(fn, recurse)


def sparse_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, r] times weight [r, c], exact, reading the rows of `weight` at the non-zeros of x only."""
    sample, row = x.nonzero(as_tuple=True)
    starts = torch.searchsorted(sample, torch.arange(len(x), device=x.device))
    return F.embedding_bag(row, weight, starts, mode="sum", per_sample_weights=x[sample, row])
