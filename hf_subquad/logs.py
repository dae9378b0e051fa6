"""The library's logger, `hf_subquad`: visible by default; silence or redirect it like any other logger."""

import logging
import sys
from typing import Any

from transformers.utils import logging as transformers_logging

_ROOT = "hf_subquad"


class _UntilConfigured(logging.Handler):
    """Writes to standard error until logging is configured, as Python does for warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            print(self.format(record), file=sys.stderr, flush=True)


def get_logger(name: str) -> Any:
    """A logger below `hf_subquad` with transformers' `warning_once`; its level is INFO unless it was set."""
    root = logging.getLogger(_ROOT)
    if not any(isinstance(handler, _UntilConfigured) for handler in root.handlers):
        root.addHandler(_UntilConfigured())
        if root.level == logging.NOTSET:
            root.setLevel(logging.INFO)
    return transformers_logging.get_logger(name)
