"""Lazy low-rank maintenance: a matrix whose updates wait as factors until their rank budget is spent."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError


class LazyMatrix(nn.Module):
    """M = weight + sum of left_i right_i, of which only the first is stored as a whole.

    Updates with the very same factor on one side (the tensor itself, not its values, is compared) share a block: their
    other factors are added, and the rank does not grow. So Gauss-Newton on a fixed training set, whose updates all
    have the features H for left factor, never spends its budget; mini-batches of other samples do.

    `torch.optim` can train `weight`; pending updates are constants to autograd.

    Args:
        weight: [r, c], taken over, not copied.
        rank_budget: most columns that pending left factors have together.

    Attributes:
        merges: times that factors were merged into `weight`, r c multiply-adds for each rank.
        changes: updates and loads so far; merges do not change M.
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

        What waits is merged first if the update does not fit beside it, and so is an update over the budget by itself.

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
        """Add what waits to `weight`, in r c multiply-adds for each rank."""
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
        """`weight` alone, with what waits merged into it."""
        self.merge()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Replaces what waits, too; a load that fails leaves the matrix as it was."""
        self.merge()
        self.changes += 1
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LazyMatrix":
        """Moves and casts find one matrix."""
        self.merge()
        return super()._apply(fn, recurse)


def sparse_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, r] times weight [r, c], exact, reading the rows of `weight` at the non-zeros of x only."""
    sample, row = x.nonzero(as_tuple=True)
    starts = torch.searchsorted(sample, torch.arange(len(x), device=x.device))
    return F.embedding_bag(row, weight, starts, mode="sum", per_sample_weights=x[sample, row])
