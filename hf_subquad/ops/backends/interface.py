"""The interface of a compute backend: the operations that take most of a sparse layer's time.

All are functions of tensors. None modifies an argument (except `out`), and none waits for the device. `backend_for`, in
the package's `__init__`, chooses one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..group_tokens import TokenTiles


class StoredRows(ABC):
    """Base rows [m, d] that are held in another form, and computed anew for each pass.

    Attributes:
        shape: (m, d).
        dtype: of the rows that `load` returns.
    """

    shape: tuple[int, int]
    dtype: torch.dtype

    @abstractmethod
    def load(self, neurons: Tensor | None = None) -> Tensor:
        """The rows, [m, d]. If only some `neurons` (int64, any shape) are needed, other rows may be zeros."""

    @abstractmethod
    def __getitem__(self, neurons: slice) -> "StoredRows": ...

    def __len__(self) -> int:
        return self.shape[0]


@dataclass(frozen=True)
class MergedWeight:
    """One weight matrix by neuron: row j is rows[j] + u[j] v.

    Attributes:
        rows: [m, d] in the compute dtype; each row contiguous if tiles gather them. `StoredRows` until they are loaded;
            backends get them loaded.
        u: [m, q], any float dtype.
        v: [q, d], any float dtype; the update's scale is in it.
        bias: [m] into neurons, [d] out of them, or None.
    """

    rows: Tensor
    u: Tensor
    v: Tensor
    bias: Tensor | None = None

    def load(self, neurons: Tensor | None = None) -> "MergedWeight":
        """With rows that are held in another form computed, all or those of some neurons."""
        return replace(self, rows=self.rows.load(neurons)) if isinstance(self.rows, StoredRows) else self

    def split(self, count: int) -> "list[MergedWeight]":
        """The first `count` neurons and the rest, as two matrices: gate and up if they are stacked in one."""
        return [
            MergedWeight(self.rows[half], self.u[half], self.v, None if self.bias is None else self.bias[half])
            for half in (slice(count), slice(count, None))
        ]


@dataclass(frozen=True)
class Scoring:
    """The inputs from which the importance of neurons is estimated.

    Attributes:
        basis: A [r, d], any float dtype.
        inputs: one input projection, or gate and up, estimated: their rows are codes over the basis, float32 [m, r].
        activation: elementwise; of the gate, if there are two.
        output_norms: ||v_j||^2 of the output rows, float32 [m].
    """

    basis: Tensor
    inputs: Sequence[MergedWeight]
    activation: Callable[[Tensor], Tensor]
    output_norms: Tensor


class Backend(ABC):
    """N tokens in n tiles of T slots; a tile computes k of m neurons.

    Attributes:
        most_scored: the largest number of tokens of a tile that `tile_scores` accepts; None: any number.
    """

    most_scored: int | None = None

    @abstractmethod
    def bisect(self, features: Tensor, count: int, size: int) -> Tensor:
        """Split the tokens' entries recursively in half, at the median along the leading principal direction.

        Args:
            features: float32 [N, r] by token; entry e stands for token e mod N.
            count: n, a power of two.
            size: T; count * size entries are at least N.

        Returns:
            int64 [n, T], the entries of each tile.
        """

    @abstractmethod
    def tile_scores(self, sample: Tensor, scoring: Scoring) -> Tensor:
        """Importance of every neuron to every tile, from a sample of its tokens [n, t, d]: float32 [n, m]."""

    @abstractmethod
    def top_neurons(self, scores: Tensor, k: int) -> Tensor:
        """The k largest of each row of scores [n, m]: int64 [n, k], in an order that suits the backend."""

    @abstractmethod
    def round_up_k(self, k: int) -> int:
        """The largest number of neurons, at least k, that costs about as much as k."""

    @abstractmethod
    def compact(self, flat: Tensor, tiles: TokenTiles, active: int) -> Tensor:
        """A flat tensor of n T k elements as [n, T, k], laid out as suits `gathered_up`."""

    @abstractmethod
    def gathered_up(
        self, x: Tensor, tiles: TokenTiles, neurons: Tensor, matrices: Sequence[MergedWeight], out: Sequence[Tensor]
    ) -> Tensor:
        """h_t = x_t (R_S + U_S V)^T + b_S, for every tile t and its neurons S.

        Args:
            x: [N, d] in the compute dtype.
            neurons: int64 [n, k].
            matrices: one, or gate and up, which share x.
            out: by matrix h [n, T, k] to write to, in the compute dtype, as `compact` makes it. Spare slots get what a
                token of zeros gives.

        Returns:
            x V^T [N, q] in the compute dtype, those of two matrices side by side.
        """

    @abstractmethod
    def gathered_down(
        self, a: Sequence[Tensor], tiles: TokenTiles, neurons: Tensor, matrices: Sequence[MergedWeight]
    ) -> tuple[Tensor, Tensor]:
        """y_t = a_t (R_S + U_S V) + b, summed over the matrices, back in token order.

        Args:
            a: by matrix [n, T, k], in the compute dtype.

        Returns:
            y [N, d]; and a_t U_S [N, q], those of two matrices side by side. Both in the compute dtype.
        """

    @abstractmethod
    def update_gradients(
        self, a: Tensor, a_low: Tensor, x: Tensor, x_low: Tensor, tiles: TokenTiles, neurons: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Gradients of sum_t <a_t, x_t (U_S V)^T> with respect to U and to V, in at least float32.

        Args:
            a: [n, T, k]; what spare slots hold does not count.
            a_low: a_t U_S, [N, q].
            x: [N, d].
            x_low: x V^T, [N, q].
            count: number m of rows of U.

        Returns:
            [m, q] and [q, d].
        """
