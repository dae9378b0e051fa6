"""Finds the checkpoint of a run to resume from, and resumes from it."""

import os
from pathlib import Path

from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..errors import SidecarError
from ..layers.patched_mlps import runtime_of
from .sidecar import SIDECAR_NAME, is_whole, load_sidecar

logger = logging.get_logger(__name__)


def last_whole_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint that a Trainer with `SubquadCallback` wrote to `output_dir`, or None.

    For use in `trainer.train(resume_from_checkpoint=last_whole_checkpoint(output_dir))`, which starts a run and, after
    a crash, continues it. The Trainer's own `resume_from_checkpoint=True` takes the highest number, complete or not.
    """
    by_step = {
        int(step): folder
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdecimal()
    }
    return next((str(by_step[step]) for step in sorted(by_step, reverse=True) if is_whole(by_step[step])), None)


def resume(model: nn.Module, folder: Path, step: int, with_callback: bool) -> None:
    """Continue with the factors of the checkpoint that the Trainer has just loaded.

    Args:
        with_callback: whether the run that wrote it had a `SubquadCallback`.

    Raises:
        SidecarError: a required sidecar is missing, or cannot be used.
    """
    try:
        load_sidecar(model, folder)
    except FileNotFoundError:
        if with_callback:
            whole = last_whole_checkpoint(folder.parent)
            other = f"resume from {whole}" if whole else "there is no complete checkpoint beside it"
            raise SidecarError(
                f"the checkpoint {folder} has no {SIDECAR_NAME}: its saving was interrupted, or the file was lost. "
                f"Its weights are complete, but its low-rank updates are missing: {other}, or load its weights with "
                "from_pretrained and start a new run"
            ) from None
        made = f"the checkpoint {folder} was made without SubquadCallback and has no {SIDECAR_NAME}"
        if hasattr(model, "peft_config"):
            raise SidecarError(f"{made}, which with PEFT adapters is the only copy of the updates") from None
        logger.warning(f"{made}. Continuing from its weights with fresh low-rank updates.")
        runtime_of(model).synced_step = step
