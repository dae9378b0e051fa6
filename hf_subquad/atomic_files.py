"""Writes files completely or not at all, and recognises files that have changed since."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from .errors import OutputError

_BLOCK, _BLOCKS = 4096, 64  # of a file's bytes that its fingerprint looks at


def write_atomically(path: Path, data: bytes) -> None:
    """Write a temporary file in the same folder, then move it into place.

    Raises:
        OutputError: it could not be written. An existing file is unchanged, and nothing is left of the new one.
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


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's size and of blocks spread over it: enough to detect other weights or a truncated file.

    Small files are read in full, large checkpoints are not.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start in range(0, size, max(_BLOCK, size // _BLOCKS)):
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()
