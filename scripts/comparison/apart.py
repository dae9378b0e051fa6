"""Runs work in a process of its own, so that its memory is given back and its peak is its own; one at a time."""

import gc
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from .memory import memory_bytes, peak_bytes_of

OnProgress = Callable[[Any], None]
Work = Callable[[Any, OnProgress], Any]

# Imported once, by the process that the others fork from. It looks in the current folder, so only what is installed.
_PRELOADED = [
    "torch", "transformers.trainer", "transformers.models.auto.modeling_auto", "transformers.models.llama",
    "transformers.models.opt", "peft", "datasets",
]  # fmt: skip
_POLL_SECONDS = 0.2


class WorkerError(RuntimeError):
    """A process failed; the message holds its name and its traceback, or how it died and what memory it held."""


def run_apart(
    name: str,
    work: Work,
    argument: Any,
    on_progress: OnProgress = lambda progress: None,
    start: str = "forkserver",
    patience: float = math.inf,
    seconds: float = math.inf,
) -> Any:
    """Run `work(argument, report)` in a process of its own and return what it returns.

    Args:
        name: for messages.
        work: a function that a fresh Python process can import; its result and all it reports are pickled.
        on_progress: gets what `work` reports.
        start: as of `multiprocessing`; with CUDA "spawn", for a fork is lost if a library asked for devices before it.
        patience, seconds: it is stopped after so long without a report, or in all.

    Raises:
        WorkerError: it raised an exception, was stopped, or the process died.
    """
    start = start if start in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(_PRELOADED)
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(work, argument, sending), name=name)
    process.start()
    sending.close()  # so that the process's death closes the pipe
    held, began, heard = 0, time.monotonic(), time.monotonic()
    try:
        while True:
            wait([receiving, process.sentinel], timeout=_POLL_SECONDS)
            held = max(held, peak_bytes_of(process.pid))
            ended = not process.is_alive()  # asked before the pipe: what it sent before its end is still there
            now = time.monotonic()
            if receiving.poll():
                heard = now
                try:
                    kind, content = receiving.recv()
                except (EOFError, OSError):
                    process.join()
                    raise WorkerError(_how_it_died(name, process.exitcode, held)) from None
                if kind == "result":
                    return content
                if kind == "error":
                    raise WorkerError(f"{name} failed:\n{content}")
                on_progress(content)
            elif ended:
                raise WorkerError(_how_it_died(name, process.exitcode, held))
            if now - heard > patience or now - began > seconds:
                process.kill()
                silent = f"it sent nothing for {patience:.0f} s"
                raise WorkerError(f"{name} was stopped: {silent if now - heard > patience else 'its time was over'}")
    finally:
        receiving.close()
        process.join(timeout=5)  # it may still be ending
        if process.is_alive():
            process.kill()
            process.join()


def _run(work: Work, argument: Any, sending: Connection) -> None:
    """What the process runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # what a fork was born with need not be looked through for garbage
    try:
        message = ("result", work(argument, lambda progress: sending.send(("progress", progress))))
    except BaseException:
        message = ("error", traceback.format_exc())
    with suppress(OSError):  # the parent may be gone
        sending.send(message)


def _end_with_parent() -> None:
    """A killed comparison must leave no training behind: it would slow down the next one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _how_it_died(name: str, code: int | None, held: int) -> str:
    if code is None or code >= 0:
        return f"{name}: the process ended with exit status {code}"
    killed_by = signal.Signals(-code).name
    text = f"{name}: the process was killed by {killed_by}; it had held {held / 1e9:.1f} GB of memory"
    if killed_by != "SIGKILL":
        return text
    return (
        f"{text}, of the machine's {memory_bytes() / 1e9:.1f} GB. Most likely the system had no memory left: "
        "reduce the batch size or the sequence length, or end other programs"
    )
