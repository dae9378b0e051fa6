"""Which checkpoint of a run to resume from: the newest that is whole, whatever interrupted the writing of others."""

import os
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .sidecar import is_whole


def last_whole_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest whole checkpoint that a Trainer with `SubquadCallback` wrote to `output_dir`; None if there is none.

    Made for `trainer.train(resume_from_checkpoint=last_whole_checkpoint(output_dir))`, which starts a run and, after a
    crash, goes on with it. The Trainer's own `resume_from_checkpoint=True` takes the highest number, whole or not.
    """
    by_step = {
        int(step): folder
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdecimal()
    }
    return next((str(by_step[step]) for step in sorted(by_step, reverse=True) if is_whole(by_step[step])), None)
