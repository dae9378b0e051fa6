"""Reads what the Trainer does not pass to its callbacks from the stack frames of the Trainer's methods.

Only this file knows names of the Trainer's local variables. If they change, it warns and falls back on the training
arguments, which are right except in hyperparameter searches and when resuming from another folder.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ..logs import get_logger

logger = get_logger(__name__)


def calling_handler() -> CallbackHandler | None:
    """The callback handler of the current event."""
    found = next((owner for _, owner in _methods() if isinstance(owner, CallbackHandler)), None)
    if found is None:
        logger.warning("subquad/... will be in the Trainer's log history, but not in its reporting integrations")
    return found


def current_trainer() -> Trainer | None:
    """The Trainer of the current event."""
    return next((owner for _, owner in _methods() if isinstance(owner, Trainer)), None)


def run_folder(args: TrainingArguments) -> Path:
    """Where the Trainer puts the checkpoints of this run; a trial of a hyperparameter search has its own folder."""
    found = _variable("trial")
    if found is None:
        return Path(args.output_dir or "")
    trainer, trial = found
    return Path(trainer._get_output_dir(trial))


def resumed_from() -> Path | None:
    """The checkpoint folder that `Trainer.train` resumes from, if it was given one."""
    found = _variable("resume_from_checkpoint")
    folder = found[1] if found else None
    return Path(folder) if isinstance(folder, str | os.PathLike) and os.path.isdir(folder) else None


def _variable(name: str) -> tuple[Trainer, Any] | None:
    """The Trainer whose method is the nearest caller that has a variable of that name, and its value."""
    for variables, owner in _methods():
        if isinstance(owner, Trainer) and name in variables:
            return owner, variables[name]
    logger.warning_once(
        f"no Trainer with a variable {name!r} calls SubquadCallback: is it called by something else, or by an "
        "unsupported version of transformers? Checkpoints are looked for in output_dir"
    )
    return None


def _methods() -> Iterator[tuple[dict[str, Any], Any]]:
    """Variables and `self` of the callers, the nearest first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if "self" in frame.f_locals:
            yield frame.f_locals, frame.f_locals["self"]
        frame = frame.f_back
