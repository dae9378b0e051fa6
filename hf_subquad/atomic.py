"""Files that are there whole or not at all."""

import os
from contextlib import suppress
from pathlib import Path

from .errors import OutputError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside its place, then move it there.

    Raises:
        OutputError: it could not be written; a former file is as it was, and nothing is left of the new one.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise OutputError(f"could not write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # as it is gone if all went well
            unfinished.unlink()
