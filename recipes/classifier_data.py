"""Token sequences and class numbers for sequence classification, of single texts or of pairs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from data import DataError, Rows, check_column, check_filled
from datasets import ClassLabel, Dataset
from settings import ClassifierSettings
from transformers import PreTrainedTokenizerBase


class Labels(NamedTuple):
    """The classes: `values[i]`, as it stands in the data, is class i and is called `names[i]`."""

    values: list[int | str]
    names: list[str]


def find_labels(rows: Rows, settings: ClassifierSettings) -> Labels:
    """The classes of the training rows: those the data set declares, else every value that occurs, sorted.

    Raises:
        DataError: no such column, labels that are not all integers or all texts, or fewer than two classes.
    """
    column = settings.label_column
    check_column(rows, column, "label_column")
    feature = rows.dataset.features[column]
    if isinstance(feature, ClassLabel):
        return Labels(list(range(feature.num_classes)), list(feature.names))
    values = rows.dataset.unique(column)
    kinds = {type(value) for value in values}
    if kinds not in ({int}, {str}, {bool}):
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise DataError(f"{rows.source}: labels in {column!r} must be all integers or all texts, got {found}")
    if len(values) < 2:
        raise DataError(f"{rows.source}: only one class in {column!r}: {values[0]!r}; raise max_train_rows?")
    return Labels(sorted(values), [str(value) for value in sorted(values)])


def make_examples(
    rows: Rows, labels: Labels, tokenizer: PreTrainedTokenizerBase, settings: ClassifierSettings
) -> Dataset:
    """Rows with the tokenizer's columns (cut at `max_length` tokens) and `labels`, the class number.

    Raises:
        DataError: a column is missing or has a gap, or a label is not one of `labels`.
    """
    columns = [settings.text_column] + ([settings.text_pair_column] if settings.text_pair_column else [])
    for setting in ("text_column", "text_pair_column", "label_column"):
        if getattr(settings, setting) is not None:
            check_column(rows, getattr(settings, setting), setting)
    numbers = {value: number for number, value in enumerate(labels.values)}

    def encode(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        for column in columns:
            check_filled(row[column], column, index + 1, rows.source)
        label = row[settings.label_column]
        if label not in numbers:
            raise DataError(
                f"{rows.source}, row {index + 1}: label {label!r} is none of the training classes "
                f"{labels.values} (a label of -1 marks a hidden test set: evaluate on another split)"
            )
        texts = [row[column] for column in columns]
        tokens = tokenizer(*texts, truncation=True, max_length=settings.max_length)
        return {**tokens, "labels": numbers[label]}

    # The label column may be called "labels" already, with another type: hence all old columns go.
    return rows.dataset.map(encode, with_indices=True, remove_columns=rows.dataset.column_names, features=None)
