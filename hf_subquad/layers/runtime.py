"""What all sparse MLPs of a model share: settings, the mode they run in, and what keeping in sync has noted."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ..config import SubquadConfig
from ..plan import Plan

Forward = Literal["auto", "dense", "sparse"]


@dataclass
class Runtime:
    """What all sparse MLPs of a model share.

    Attributes:
        forward: 'auto' is sparse in training (and in evaluation if `sparse_eval`); the others force it.
        dense_step: the coming training step runs dense (`dense_share`).
        sync_seconds: time spent keeping in sync so far.
        synced_step: the step that was synced last.
        seen_calls: sparse forward passes of all MLPs when a training step was last checked for some.
        last_report: what the latest sync measured, for logs.
        plan: where the budgets come from, if they were planned; kept up to date as they change.
    """

    config: SubquadConfig
    forward: Forward = "auto"
    dense_step: bool = False
    sync_seconds: float = 0.0
    synced_step: int | None = None
    seen_calls: int = 0
    last_report: Any = field(default=None, repr=False)
    plan: Plan | None = None

    def sparse(self, training: bool) -> bool:
        if self.forward != "auto":
            return self.forward == "sparse"
        return not self.dense_step if training else self.config.sparse_eval
