"""Token sequences and loss masks for causal language models, and the accuracy of answers.

Two ways to make sequences of at most `max_length` tokens:
- templates: one row, one sequence: [BOS] prompt answer EOS. Prompt and answer are tokenised apart, so that
  the boundary is at the same token in training as it is when an answer is generated after the prompt. With `packing`
  the sequences are joined and cut into blocks.
- plain text: documents, each [BOS] text EOS, are joined and cut into blocks.
BOS is put where the tokenizer, or its chat template, puts it by itself. A label of -100 carries no loss.
"""

import string
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from data import DataError, Rows, check_column, check_filled
from datasets import Dataset
from settings import LmSettings
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase

NO_LOSS = -100


def predicted_tokens(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """The Trainer's `preprocess_logits_for_metrics`: keeps token ids [B, S], not logits [B, S, vocabulary]."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def answer_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The Trainer's `compute_metrics`: the share of answers, EOS included, of which every token is the most likely one.

    These are the answers that greedy decoding after the prompt gets right: it sees the same tokens as long as it does.
    """
    tokens, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    right = ((tokens == labels) | (labels == NO_LOSS)).all(1)
    return {"accuracy": float(right.mean())}


class Sequences(NamedTuple):
    """Rows with the columns input_ids, attention_mask, labels; and a line that says what they hold."""

    dataset: Dataset
    summary: str


def make_sequences(rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: LmSettings) -> Sequences:
    """Tokenised sequences of `rows`.

    Raises:
        DataError: a column is missing or has a gap, a template is malformed, or nothing is left to learn.
    """
    if settings.prompt_template is None:
        sequences = _blocks(rows, tokenizer, settings)
    else:
        sequences = _prompts_and_answers(rows, tokenizer, settings)
        if settings.packing:
            sequences = _packed(sequences, settings.max_length)
    total = len(sequences)
    sequences = sequences.filter(lambda labels: any(_targets(labels)), input_columns="labels")
    if len(sequences) == 0:
        raise DataError(
            f"{rows.source}: no token to learn from within max_length: {settings.max_length}; "
            f"raise max_length, shorten prompt_template, or check {', '.join(rows.dataset.column_names)}"
        )
    return Sequences(sequences, _summary(rows, sequences, total - len(sequences), settings.max_length))


def encode_pair(
    prompt: str,
    answer: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    loss_on: Literal["answers", "all"],
    chat: bool = False,
) -> dict[str, list[int]]:
    """One sequence [BOS] prompt answer EOS, cut at `max_length` tokens, with its labels.

    Args:
        chat: the prompt is a user's turn in the tokenizer's chat template, and the answer begins the assistant's.
    """
    if chat:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt_ids = _ids(text, tokenizer)
    else:
        prompt_ids = bos_ids(tokenizer) + _ids(prompt, tokenizer)
    answer_ids = _ids(answer, tokenizer) + eos_ids(tokenizer)
    masked = [NO_LOSS] * len(prompt_ids) if loss_on == "answers" else prompt_ids
    return _sequence((prompt_ids + answer_ids)[:max_length], (masked + answer_ids)[:max_length])


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] where the tokenizer starts every text with it, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


def eos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _prompts_and_answers(rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: LmSettings) -> Dataset:
    templates = {name: getattr(settings, name) for name in ("prompt_template", "answer_template")}
    if settings.chat and not tokenizer.chat_template:
        raise DataError(f"chat: the tokenizer of {settings.model} has no chat template; set chat to false")
    columns = {column for name, text in templates.items() for column in _template_columns(rows, text, name)}

    def encode(row: Mapping[str, Any], index: int) -> dict[str, list[int]]:
        for column in columns:
            check_filled(row[column], column, index + 1, rows.source)
        prompt, answer = (text.format_map(row) for text in templates.values())
        return encode_pair(prompt, answer, tokenizer, settings.max_length, settings.loss_on, settings.chat)

    return rows.dataset.map(encode, with_indices=True, remove_columns=rows.dataset.column_names)


def _packed(sequences: Dataset, length: int) -> Dataset:
    """Sequences joined and cut into blocks of `length` tokens, a thousand rows at a time."""

    def pack(rows: Mapping[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: [value for row in column for value in row] for name, column in rows.items()}
        return {
            name: [stream[start : start + length] for start in range(0, len(stream), length)]
            for name, stream in joined.items()
        }

    return sequences.map(pack, batched=True)


def _template_columns(rows: Rows, template: str, setting: str) -> set[str]:
    """The columns that a template names, each known to be there."""
    try:
        columns = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise DataError(f"{setting} is malformed ({error}): {template!r}; write {{{{ for a brace") from error
    for column in columns:
        check_column(rows, column, setting)
    return columns


def _blocks(rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: LmSettings) -> Dataset:
    column, length = settings.text_column, settings.max_length
    check_column(rows, column, "text_column")
    before, after = bos_ids(tokenizer), eos_ids(tokenizer)

    def pack(texts: list[str], indices: list[int]) -> dict[str, list[list[int]]]:
        stream: list[int] = []
        for text, index in zip(texts, indices, strict=True):
            check_filled(text, column, index + 1, rows.source)
            stream += before + _ids(text, tokenizer) + after
        blocks = [stream[start : start + length] for start in range(0, len(stream), length)]
        return _columns([_sequence(block, block) for block in blocks])

    # A thousand rows at a time: the last block of each thousand may be short, and no token is lost.
    return rows.dataset.map(
        pack, batched=True, with_indices=True, input_columns=column, remove_columns=rows.dataset.column_names
    )


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # verbose=False: a text longer than the model's context is no fault here, it is cut afterwards
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _sequence(ids: list[int], labels: list[int]) -> dict[str, list[int]]:
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(labels)}


def _columns(sequences: list[dict[str, list[int]]]) -> dict[str, list[list[int]]]:
    return {name: [one[name] for one in sequences] for name in ("input_ids", "attention_mask", "labels")}


def _targets(labels: list[int]) -> list[bool]:
    """Which labels carry loss. The first never does: nothing comes before it to predict it from."""
    return [label != NO_LOSS for label in labels[1:]]


def _summary(rows: Rows, sequences: Dataset, left_out: int, max_length: int) -> str:
    lengths = [len(labels) for labels in sequences["labels"]]
    targets = sum(sum(_targets(labels)) for labels in sequences["labels"])
    full = sum(length == max_length for length in lengths)
    text = (
        f"{rows.source}: {len(rows.dataset)} rows, {len(lengths)} sequences, {sum(lengths)} tokens, "
        f"{targets} of them with loss; {full} sequences of max_length {max_length}"
    )
    return text + (f"; {left_out} left out (nothing to learn within max_length)" if left_out else "")
