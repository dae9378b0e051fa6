"""The rows of the hidden states that have a label, and their labels."""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # transformers' label of a position without loss


@dataclass(frozen=True)
class LabelledRows:
    """The positions of a batch that have a label.

    Attributes:
        shape: of the labels, (batch, length).
        index: positions in the flattened batch, int64, in order; shape (rows,).
        labels: the label of each; shape (rows,).
    """

    shape: torch.Size
    index: Tensor
    labels: Tensor

    @classmethod
    def of(cls, labels: Tensor, shifted: bool) -> "LabelledRows":
        """
        Args:
            labels: token ids or `IGNORED`; shape (batch, length).
            shifted: position t is scored against label t + 1, as in causal LMs; otherwise against label t.
        """
        if shifted:
            labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        flat = labels.reshape(-1)
        index = (flat != IGNORED).nonzero().squeeze(-1)
        return cls(labels.shape, index, flat[index])

    def gather(self, hidden: Tensor) -> Tensor:
        """The labelled rows of hidden states (batch, length, width), as a batch of one; shape (1, rows, width)."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat.index_select(0, self.index.to(hidden.device)).unsqueeze(0)
