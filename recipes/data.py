"""Rows to train on and to evaluate on: from files, or from any data set that `datasets` knows."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from settings import Settings


class DataError(ValueError):
    """Data cannot be used as asked; the message names the file or data set, what is in it, and the fix."""


class Rows(NamedTuple):
    """Rows and, for messages, where they come from."""

    dataset: Dataset
    source: str


def load_rows(settings: Settings, part: Literal["train", "eval"]) -> Rows:
    """The rows for training or for evaluation, at most `max_train_rows` or `max_eval_rows` of them.

    Raises:
        DataError: a file or data set that is missing, damaged or empty.
    """
    path = settings.train_file if part == "train" else settings.eval_file
    split = settings.train_split if part == "train" else settings.eval_split
    limit = settings.max_train_rows if part == "train" else settings.max_eval_rows
    rows = _read_file(Path(path), settings.text_column) if path else _load_split(settings, split)
    if len(rows.dataset) == 0:
        raise DataError(f"{rows.source} has no rows")
    return rows if limit is None else rows._replace(dataset=rows.dataset.take(min(limit, len(rows.dataset))))


def check_column(rows: Rows, column: str, setting: str) -> None:
    """Raises DataError if the rows lack `column`, which the setting called `setting` asks for."""
    names = rows.dataset.column_names
    if column in names:
        return
    near = difflib.get_close_matches(column, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(
        f"{rows.source} has no column {column!r}, which {setting} names. Its columns are: {', '.join(names)}{hint}"
    )


def check_filled(value: object, column: str, row: int, source: str) -> None:
    """Raises DataError if a row (counted from 1) has nothing in `column`."""
    if value is None:
        raise DataError(f"{source}, row {row}: nothing in column {column!r}; fill it or remove the row")


def _read_file(path: Path, text_column: str) -> Rows:
    readers = {".jsonl": _read_jsonl, ".txt": lambda p: [{text_column: p.read_text(encoding="utf-8")}]}
    if path.suffix not in readers:
        raise DataError(f"{path}: files must end in .jsonl or .txt; for other formats set dataset to their folder")
    try:
        rows = readers[path.suffix](path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error
    if path.stat().st_size == 0 or not rows:
        raise DataError(f"{path} is empty")
    return Rows(Dataset.from_list(rows), str(path))


def _read_jsonl(path: Path) -> list[dict[str, object]]:
    """Objects of a JSON-lines file; blank lines are skipped. All rows must have the keys of the first."""
    rows: list[dict[str, object]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}, is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}, must be an object {{...}}, got {type(row).__name__}")
            if rows and row.keys() != rows[0].keys():
                raise DataError(_other_keys(path, number, list(row), list(rows[0])))
            rows.append(row)
    return rows


def _other_keys(path: Path, number: int, found: Sequence[str], expected: Sequence[str]) -> str:
    return f"{path}, line {number}, has the keys {', '.join(found)}; the first line has {', '.join(expected)}"


def _load_split(settings: Settings, split: str) -> Rows:
    name = " ".join(filter(None, (settings.dataset, settings.dataset_config)))
    source = f"data set {name}, split {split}"
    try:
        dataset = load_dataset(settings.dataset, settings.dataset_config, split=split)
    except (DatasetsError, ValueError, OSError, StopIteration) as error:
        raise DataError(f"cannot load {source}: {error or 'a file of it is empty'}") from error
    return Rows(dataset, source)
