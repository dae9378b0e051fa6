"""The library's logger, `hf_subquad`: visible by default; silence or redirect it like any other logger."""

import logging
import sys

from transformers.utils.logging import get_logger as get_logger  # whose loggers have `warning_once`


class _UntilConfigured(logging.Handler):
    """Writes to standard error until logging is configured, as Python does for warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            print(self.format(record), file=sys.stderr, flush=True)


_root = logging.getLogger("hf_subquad")
_root.addHandler(_UntilConfigured())
if _root.level == logging.NOTSET:
    _root.setLevel(logging.INFO)
