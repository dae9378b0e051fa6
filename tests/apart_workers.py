"""Work for the tests of processes: apart from the tests, so that a process imports little."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def double(number: int, report: Callable[[Any], None]) -> list[int]:
    """Reports the steps to twice the number, and returns the process's id and the result."""
    for step in range(3):
        report(step)
    return [os.getpid(), 2 * number]


def die(how: str, report: Callable[[Any], None]) -> None:
    report("alive")
    if how == "killed":
        held = bytearray(300_000_000)
        held[::4096] = b"x" * len(held[::4096])
        time.sleep(1)  # so that it is seen to hold them
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exits":
        os._exit(3)
    raise EOFError("a truncated file")


def sleep(folder: str, report: Callable[[Any], None]) -> None:
    """Leave a file with the process's number, and do not end by itself."""
    Path(folder, "pid").write_text(str(os.getpid()))
    time.sleep(600)
