"""Processes for the tests of turn-taking: apart from the tests, so that starting one imports little."""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from comparison.turns import Turns


def use_turns(name: str, turns: Turns) -> list[tuple[int, float, float]]:
    """Three turns; per turn its number, and when it began and ended (on the clock that all processes share)."""
    held = []
    for number in range(3):
        turns.wait({"step": number}, {name: number})
        start = time.monotonic()
        time.sleep(0.02)
        held.append((turns.round, start, time.monotonic()))
    assert turns.shared.keys() == {"a", "b"}
    assert turns.waiting_cpu_seconds < 0.05
    return held


def die(how: str, turns: Turns) -> None:
    """Die in the first turn; or, for "waits", work as long as there are turns."""
    turns.wait()
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exits":
        os._exit(3)
    if how == "raises":
        raise EOFError("a truncated file")
    while True:
        turns.wait()
