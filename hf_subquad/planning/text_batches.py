"""Batches of token blocks from a text file, for planning before there is a training script."""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import CalibrationError


def read_text(path: Path, column: str) -> str:
    """The text of a .txt file, or of one column of a .jsonl file.

    Raises:
        CalibrationError: a line of a .jsonl file has no such text.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return text
    parts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = json.loads(line)
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            raise CalibrationError(f"{path}, line {number}: no text in {column!r}; name another with --column")
        parts.append(row[column])
    return "\n\n".join(parts)


def text_batches(
    text: str, tokenizer: PreTrainedTokenizerBase, rows: int, length: int, count: int, decoder: bool = False
) -> list[dict[str, Tensor]]:
    """`count` batches of `rows` blocks of `length` tokens, spread over the text.

    Args:
        decoder: the model is an encoder-decoder, whose decoder reads the block too.

    Raises:
        CalibrationError: the text is too short for one block.
    """
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    blocks = tokens[: len(tokens) // length * length].view(-1, length)
    if not len(blocks):
        raise CalibrationError(f"{len(tokens)} tokens of text do not fill one block of {length}")
    wanted = min(rows * count, len(blocks))
    spread = blocks[torch.arange(wanted) * len(blocks) // wanted]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in spread.split(rows)]
    return [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in batches] if decoder else batches
