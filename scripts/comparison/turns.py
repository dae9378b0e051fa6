"""Processes that take turns: exactly one computes at a time, the others sleep in a read of their pipe.

Timing several programs side by side on one machine is fair only if they neither compete for its cores nor run at
different times of the day. Here each has a process of its own (own memory peak, own random state), and the parent
hands out turns in rounds.
"""

import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

Shared = dict[str, Any]
OnTurn = Callable[[str, Mapping[str, Any]], None]


class WorkerError(RuntimeError):
    """A process failed; the message holds its name and its traceback, or how it died."""


class ParentGone(Exception):
    """The parent has died, or wants this process to stop."""


class Turns:
    """The process's end of the pipe. The work is free to run until its first `wait` (its set-up is a turn too).

    Attributes:
        round: number of the current turn, from 0; -1 during set-up.
        shared: what all processes have published with `wait(share=...)` so far.
        waiting_cpu_seconds: processor time this process used while it had to be idle.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.round = -1
        self.shared: Shared = {}
        self.waiting_cpu_seconds = 0.0

    def wait(self, progress: Mapping[str, Any] | None = None, share: Shared | None = None) -> None:
        """End this turn, and return when the next one begins.

        Args:
            progress: for the parent's display.
            share: for all processes, merged into `shared`.

        Raises:
            ParentGone: there will be no next turn.
        """
        before = time.process_time()
        try:
            self._connection.send(("waiting", dict(progress or {}), share or {}))
            self.round, self.shared = self._connection.recv()
        except (EOFError, OSError) as error:
            raise ParentGone from error
        self.waiting_cpu_seconds += time.process_time() - before


Work = Callable[[Any, Turns], Any]


def run_in_turns(
    work: Work, arguments: Mapping[str, Any], on_turn: OnTurn = lambda name, progress: None
) -> dict[str, Any]:
    """Run `work(argument, turns)` in one process per argument, in turns.

    Args:
        work: a function that a fresh Python process can import; what it returns is sent back, pickled.
        arguments: by name of the process.
        on_turn: told after each turn who had it and what it says of its progress.

    Returns:
        The results by name.

    Raises:
        WorkerError: a process raised an exception or died. The others are stopped.
    """
    workers: dict[str, _Worker] = {}
    results: dict[str, Any] = {}
    shared: Shared = {}

    def hear(name: str) -> None:
        kind, content, share = workers[name].receive()
        shared.update(share)
        if kind == "result":
            results[name] = content
            workers[name].stop()  # its memory is free before the next turn
        else:
            on_turn(name, content)

    try:
        for name, argument in arguments.items():
            workers[name] = _Worker(name, work, argument)
            hear(name)
        number = 0
        while len(results) < len(workers):
            names = list(workers)
            first = number % len(names)  # so that nobody always follows the same neighbour
            for name in names[first:] + names[:first]:
                if name not in results:
                    workers[name].connection.send((number, shared))
                    hear(name)
            number += 1
    finally:
        for worker in workers.values():
            worker.stop()
    return results


class _Worker:
    """The parent's end."""

    def __init__(self, name: str, work: Work, argument: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(work, argument, theirs), name=name, daemon=True)
        self.process.start()
        theirs.close()  # so that the child's death closes the pipe

    def receive(self) -> tuple[str, Any, Shared]:
        # The sentinel too: a grandchild may hold the pipe open after the child's death.
        wait([self.connection, self.process.sentinel])
        try:
            message = self.connection.recv() if self.connection.poll() else None
        except (EOFError, OSError):
            message = None
        if message is None:
            self.process.join()
            raise WorkerError(f"{self.name}: the process died: {_describe_exit(self.process.exitcode)}")
        if message[0] == "error":
            raise WorkerError(f"{self.name} failed:\n{message[1]}")
        return message

    def stop(self) -> None:
        """Let the process end if it is idle or done, kill it if it is computing."""
        self.connection.close()
        self.process.join(timeout=5)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()


def _run(work: Work, argument: Any, connection: Connection) -> None:
    """What the process runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        message = ("result", work(argument, Turns(connection)), {})
    except ParentGone:
        sys.exit(1)
    except BaseException:
        message = ("error", traceback.format_exc(), {})
    connection.send(message)


def _describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"exit status {code}"
