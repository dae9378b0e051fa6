"""Finds the Trainer, which its callbacks are not given, and what it knows, by the stack frames of its methods.

Only this file uses the Trainer's private attributes and the local variables of its methods. Without a Trainer it warns
and falls back on the training arguments, which are right except in hyperparameter searches and when resuming from
another folder.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import Trainer, TrainingArguments

from ..logs import get_logger

logger = get_logger(__name__)


def current_trainer() -> Trainer | None:
    """The Trainer of the current event."""
    found = next((owner for _, owner in _trainers()), None)
    if found is None:
        logger.warning_once(
            "no Trainer calls SubquadCallback: is it called by something else, or by an unsupported version of "
            "transformers? Checkpoints are looked for in output_dir, and subquad/... will be in the log history, but "
            "not in reporting integrations"
        )
    return found


def run_folder(args: TrainingArguments) -> Path:
    """Where the Trainer puts the checkpoints of this run; a trial of a hyperparameter search has its own folder."""
    trainer = current_trainer()
    return Path((trainer._get_output_dir(getattr(trainer, "_trial", None)) if trainer else args.output_dir) or "")


def resumed_from() -> Path | None:
    """The checkpoint folder that `Trainer.train` resumes from, if it was given one."""
    found = (variables.get("resume_from_checkpoint") for variables, _ in _trainers())
    return next((Path(folder) for folder in found if isinstance(folder, str) and os.path.isdir(folder)), None)


def _trainers() -> Iterator[tuple[dict[str, Any], Trainer]]:
    """Variables and `self` of the callers that are a Trainer's methods, the nearest first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(owner := frame.f_locals.get("self"), Trainer):
            yield frame.f_locals, owner
        frame = frame.f_back
