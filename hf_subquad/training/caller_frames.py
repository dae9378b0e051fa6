"""Reads what the Trainer does not pass to its callbacks from the stack frames of the Trainer's methods.

Only this file knows names of the Trainer's local variables. If they change, or something else calls the callback, it
warns, and the callback falls back on the training arguments.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import Trainer

from ..logs import get_logger

logger = get_logger(__name__)


def current_trainer() -> Trainer | None:
    """The Trainer of the current event."""
    found = next((owner for _, owner in _methods() if isinstance(owner, Trainer)), None)
    if found is None:
        logger.warning_once(
            "no Trainer calls SubquadCallback: checkpoints are looked for in output_dir, the head stays as it is, and "
            "subquad/... does not reach the reporting integrations"
        )
    return found


def resumed_from() -> Path | None:
    """The checkpoint folder that `Trainer.train` resumes from, if it was given one."""
    for variables, owner in _methods():
        if isinstance(owner, Trainer) and "resume_from_checkpoint" in variables:
            folder = variables["resume_from_checkpoint"]
            return Path(folder) if isinstance(folder, str | os.PathLike) else None
    logger.warning_once(
        "no Trainer with a variable 'resume_from_checkpoint' calls SubquadCallback (an unsupported version of "
        "transformers?): checkpoints are looked for in output_dir"
    )
    return None


def _methods() -> Iterator[tuple[dict[str, Any], Any]]:
    """Variables and `self` of the callers, the nearest first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if "self" in frame.f_locals:
            yield frame.f_locals, frame.f_locals["self"]
        frame = frame.f_back
