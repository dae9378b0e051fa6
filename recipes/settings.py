"""Settings of the training scripts: one flat YAML file, plus `--set key=value` for what differs this once.

A key is one of ours (the dataclasses below), one of `SubquadConfig` (sparse layers), or one of transformers'
`TrainingArguments` (everything else about training). Any other key is an error.
"""

import argparse
import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from methods import Method, Rest
from transformers import TrainingArguments

from hf_subquad.config import SubquadConfig

S = TypeVar("S", bound="Settings")


class SettingsError(ValueError):
    """A setting is unknown, missing, of the wrong type or has no effect; the message says the fix."""


@dataclass(frozen=True, kw_only=True)
class Settings(SubquadConfig):
    """What both scripts need. `rank` and `alpha` (from SubquadConfig) hold for LoRA adapters too, and `seed`
    for data order and fresh weights too.

    Raises:
        SettingsError: settings that contradict each other.
        hf_subquad.errors.ConfigError: a setting of the sparse layers is out of range.
    """

    model: str  # Hub name, or path of a folder
    method: Method
    rest: Rest = "lora"  # treatment of what "subquad" does not patch, see methods.py
    plan: str | None = None  # JSON file of `hf-subquad plan --save`; null: planned at the start, if `active` is null
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # weights are loaded and saved in it
    output_dir: str
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    resume_from_checkpoint: bool | str = False  # true: the last one in output_dir; or the path of one

    # Either a data set known to `datasets` (Hub name or folder) ...
    dataset: str | None = None
    dataset_config: str | None = None
    train_split: str = "train"  # slices such as "train[:90%]" work
    eval_split: str = "test"
    # ... or two files: .jsonl (an object a line) or .txt
    train_file: str | None = None
    eval_file: str | None = None
    text_column: str = "text"
    max_length: int = 512  # tokens of a sequence; what is longer is cut
    max_train_rows: int | None = None  # take the first rows only; null: all
    max_eval_rows: int | None = None

    training: dict[str, Any] = field(default_factory=dict)  # keys of TrainingArguments; flat in the YAML

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.dataset is None) == (self.train_file is None):
            raise SettingsError("set either dataset (a Hub name or a folder) or train_file and eval_file")
        if (self.train_file is None) != (self.eval_file is None):
            raise SettingsError("train_file and eval_file go together: every run ends with an evaluation on other data")
        for name, low in (("max_length", 2), ("max_train_rows", 1), ("max_eval_rows", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise SettingsError(f"{name} must be at least {low}, got {value}")

        if self.plan is not None and not Path(self.plan).is_file():
            raise SettingsError(f"plan: there is no file {self.plan} (seen from {Path.cwd()})")

    def subquad_config(self) -> SubquadConfig:
        return SubquadConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(SubquadConfig)})


@dataclass(frozen=True, kw_only=True)
class LmSettings(Settings):
    """Settings of finetune_lm.py. Without templates, `text_column` (or a .txt file) is cut into blocks of
    `max_length` tokens; with both templates, every row is one prompt and its answer."""

    prompt_template: str | None = None  # e.g. "Question: {question}\nAnswer:"
    answer_template: str | None = None  # e.g. " {answer}"
    chat: bool = False  # prompt and answer become a user's and an assistant's turn in the tokenizer's chat template
    loss_on: Literal["answers", "all"] = "all"
    packing: bool = False  # join prompts and answers and cut them into blocks of max_length tokens: no padding
    answer_accuracy: bool = False  # also evaluate the share of answers that greedy decoding gets right to the token

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt_template is None) != (self.answer_template is None):
            raise SettingsError("prompt_template and answer_template go together: set both or neither")
        needs_templates = {
            "loss_on: answers": self.loss_on == "answers", "chat": self.chat, "packing": self.packing,
            "answer_accuracy": self.answer_accuracy,
        }  # fmt: skip
        for name, is_set in needs_templates.items():
            if is_set and self.prompt_template is None:
                raise SettingsError(f"{name} needs prompt_template and answer_template")
        if self.answer_accuracy and (self.packing or self.loss_on != "answers"):
            raise SettingsError("answer_accuracy needs loss_on: answers, without packing: one answer a sequence")


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings(Settings):
    """Settings of finetune_classifier.py."""

    text_pair_column: str | None = None  # second text of a pair, e.g. the hypothesis of an entailment task
    label_column: str = "label"


# Keys of TrainingArguments that have a namesake above, or no meaning in these scripts.
_NOT_PASSED_ON = {f.name for f in dataclasses.fields(Settings)} | {
    "activation_checkpointing",
    "do_train",
    "do_eval",
    "do_predict",
    "local_rank",
}

_SPARSE_KEYS = {f.name for f in dataclasses.fields(SubquadConfig)} - {"rank", "alpha", "seed"} | {"rest", "plan"}
_WITHOUT_EFFECT: dict[str, set[str]] = {
    "vanilla": _SPARSE_KEYS | {"rank", "alpha"},
    "lora": _SPARSE_KEYS,
    "subquad": set(),
}


def parse_settings(cls: type[S], argv: Sequence[str] | None = None, description: str | None = None) -> S:
    """Settings from a command line: `--config FILE [--set key=value ...] [--dry-run]`.

    Raises:
        SettingsError: see `settings_from_mapping`, or the file cannot be read.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="YAML file of settings")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides",
        help="settings that replace those of the file; values are YAML",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="two steps on a few rows, written to OUTPUT_DIR/dry-run")
    options = parser.parse_args(argv)
    settings = settings_from_mapping(cls, read_yaml(options.config) | parse_overrides(options.overrides))
    return shorten(settings) if options.dry_run else settings


def settings_from_mapping(cls: type[S], values: Mapping[str, Any]) -> S:
    """Settings from flat keys and values, each checked.

    Raises:
        SettingsError: an unknown key (the message lists near misses), a missing key, a value of the wrong
            type, or a key that has no effect with the chosen method.
    """
    ours = {name: kind for name, kind in _type_hints(cls).items() if name != "training"}
    passed_on = {k: t for k, t in _type_hints(TrainingArguments).items() if _is_training_key(k) and k not in ours}
    for key, value in values.items():
        if key not in ours and key not in passed_on:
            raise SettingsError(_unknown_key(key, [*ours, *passed_on]))
        kind = ours.get(key, passed_on.get(key))
        if not _matches(value, kind):
            raise SettingsError(f"{key} must be {_describe(kind)}, got {value!r}")
    required = [f.name for f in dataclasses.fields(cls) if _is_required(f)]
    missing = [name for name in required if name not in values]
    if missing:
        raise SettingsError(f"missing settings: {', '.join(missing)}")
    useless = sorted(_WITHOUT_EFFECT[values["method"]] & set(values))
    if useless:
        raise SettingsError(
            f"{', '.join(useless)}: no effect with method: {values['method']}; remove, or use another method"
        )
    training = {key: value for key, value in values.items() if key not in ours}
    return cls(**{key: value for key, value in values.items() if key in ours}, training=training)


def read_yaml(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML file.

    Raises:
        SettingsError: the file is missing, is not YAML, is not a mapping, or has a key twice.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_YamlLoader)
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path} must hold lines of 'key: value', got {type(values).__name__}")
    return values


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """["max_steps=3", "bf16=true"] as {"max_steps": 3, "bf16": True}.

    Raises:
        SettingsError: a pair without "=", or a value that is not YAML.
    """
    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise SettingsError(f"--set takes key=value, got {pair!r}")
        try:
            values[key.strip()] = yaml.load(text, Loader=_YamlLoader)
        except yaml.YAMLError as error:
            raise SettingsError(f"the value of {key} is not valid YAML: {text!r}") from error
    return values


def shorten(settings: S) -> S:
    """The same run, small enough to see in a minute whether all of it works."""
    training = settings.training | {"max_steps": 2, "logging_steps": 1, "eval_steps": 2, "save_steps": 2}
    return dataclasses.replace(
        settings,
        output_dir=str(Path(settings.output_dir) / "dry-run"),
        resume_from_checkpoint=False,
        max_train_rows=min(settings.max_train_rows or 32, 32),
        max_eval_rows=min(settings.max_eval_rows or 8, 8),
        training=training,
    )


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that 1e-4 is a number (as in YAML 1.2) and a key given twice is an
    error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"key given twice: {', '.join(sorted(twice))}")
        return super().construct_mapping(node, deep)


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _is_training_key(name: str) -> bool:
    return name in {f.name for f in dataclasses.fields(TrainingArguments)} - _NOT_PASSED_ON


def _is_required(f: "dataclasses.Field[Any]") -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _unknown_key(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(str(key), known, n=3, cutoff=0.7)
    hint = f"did you mean {' or '.join(near)}?" if near else "see recipes/settings.py for the keys"
    return f"unknown setting {key!r}; {hint}"


def _matches(value: Any, kind: Any) -> bool:
    """Whether a YAML value is of the annotated type. Integers pass as floats, booleans never as numbers."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, one) for one in arguments)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    if origin is list:
        return isinstance(value, list) and all(_matches(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if kind is Any:
        return True
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return value in [one.value for one in kind]
    return isinstance(value, kind)


def _describe(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(one) for one in arguments)
    if origin is Literal:
        return " or ".join(repr(one) for one in arguments)
    if origin is list:
        return f"a list of ({_describe(arguments[0])})"
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))
