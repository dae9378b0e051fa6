"""Rows of random tokens with the classes of real ones: prompts without loss, answers, padding."""

import torch
from torch import Tensor

GSM8K = (0.36, 0.23)  # shares of padding and of context, in batches of 8 padded to the longest
_NO_LOSS = -100


def random_rows(
    count: int, length: int, vocab: int, padding: float, context: float, seed: int
) -> list[dict[str, Tensor]]:
    """Rows of one length. In each another share is padding, and of the rest the same share is prompt.

    Args:
        padding: its mean share of the tokens, at most a half.
        context: that of tokens without loss that are not padding.
    """
    generator = torch.Generator().manual_seed(seed)
    # The first ids are the special ones (padding, start, end), which mean something to the model.
    ids = torch.randint(min(4, vocab - 1), vocab, (count, length), generator=generator)
    spread = (torch.randperm(count, generator=generator)[:, None] + 0.5) / count  # evenly over [0, 1]
    real = (length * (1 - 2 * padding * spread)).round()
    places = torch.arange(length).expand(count, -1)
    labels = ids.masked_fill((places >= real) | (places < real * context / (1 - padding)), _NO_LOSS)
    columns = {"input_ids": ids, "attention_mask": (places < real).long(), "labels": labels}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
