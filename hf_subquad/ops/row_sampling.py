"""Which rows of a gradient are propagated back: a random sample that stands for all of them.

Rows with large norms are kept; smaller ones with a probability in proportion to their norm, and multiplied by its
inverse (threshold sampling: Duffield, Lund and Thorup 2005; of tokens in backpropagation: Wang, Chen and Zhu, VCAS,
ICLR 2024). So the expectation is the whole gradient. To keep the largest rows only would be a bias: it leaves out the
same kind of token in every step, those that the model predicts well already.
"""

import torch
from torch import Tensor


def row_norms(gradient: Tensor) -> Tensor:
    """Norms of the rows of a gradient [N, d], at least float32 [N]."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient, dim=1, dtype=dtype)


def keep_probabilities(norms: Tensor, share: float) -> Tensor:
    """The probability with which each row is kept, [N]: min(1, norm / t), with the t for which the expected squared
    error of the sampled gradient is 1 - share of its squared norm.

    A row with probability p that is kept with weight 1 / p has the expected squared error norm^2 (1 / p - 1), which is
    norm (t - norm) for rows below t. Rows of zeros have probability 0. Rows that are not finite have 1 or NaN.
    """
    if share >= 1 or not len(norms):
        return (norms != 0).to(norms.dtype)
    ordered = norms.sort(descending=True).values
    rest = ordered.flip(0).cumsum(0).flip(0)  # sums over a row and those after it, which are the smaller ones
    squares = ordered.square().flip(0).cumsum(0).flip(0)
    threshold = ((1 - share) * squares[:1] + squares) / rest
    # With t between two neighbours, these formulas hold for the rows below it: the first of which t is not below.
    found = threshold.gather(0, (threshold >= ordered).to(torch.uint8).argmax(0, keepdim=True))
    return torch.where(norms == 0, norms, (norms / found).clamp_max(1))


def sampled_weights(probability: Tensor) -> Tensor:
    """What rows with these probabilities are multiplied by, [N]: 1 / p, or 0 for rows that are left out.

    One random number from PyTorch's default generator chooses all of them (systematic sampling), so their number
    hardly varies.
    """
    below = probability < 1  # false for NaN: a gradient that is not finite is propagated as it is
    ends = torch.where(below, probability, 0).cumsum(0) + torch.rand((), device=probability.device)
    drawn = ends.floor() != torch.cat([ends.new_zeros(1), ends[:-1].floor()])
    return torch.where(below, torch.where(drawn & (probability > 0), 1 / probability, 0), 1)
