"""Runs the sections in a process of its own that may hang, crash or lose the device, and writes down what it sends."""

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .report import markdown, problems
from .settings import Settings
from .worker import serve

_TO_START = 180.0  # seconds that a process may take to import PyTorch and find the device
_TO_FINISH = 10.0  # seconds of the time kept back, if there are minutes
_GRACE = 5.0  # of them, for the case that is running

Results = dict[str, Any]


class Unusable(Exception):
    """Nothing can run here; the message says why."""


class Supervisor:
    """Attributes:
    results: all that is known so far, as it is written.
    """

    def __init__(self, settings: Settings, provenance: dict[str, Any]) -> None:
        self.settings = settings
        self.started = time.monotonic()
        self.until = self.started + 60 * settings.minutes - min(_TO_FINISH, 6 * settings.minutes)
        self.worker: _Worker | None = None
        self.results: Results = {
            "device": {},
            "settings": {
                "minutes": settings.minutes, "sections": list(settings.sections), "sweep": settings.sweep,
                "tiny": settings.tiny, "device": settings.device, "vocabulary": settings.vocabulary,
            },
            "sections": {
                name: {"state": "skipped", "seconds": 0.0, "cases": [], "rows": [], "skipped": [], "errors": []}
                for name in settings.sections
            },
            "provenance": provenance,
        }  # fmt: skip

    def run(self) -> None:
        """
        Raises:
            Unusable: there is no device, or the process does not start.
        """
        try:
            self._start()
            self.ready = time.monotonic()
            for name in self.settings.sections:
                started = time.monotonic()
                self._section(name)
                section = self.results["sections"][name]
                section["seconds"] = time.monotonic() - started
                self._say(f"{name}: {section['state']} after {section['seconds']:.0f} s")
                self.save()
        finally:
            if self.worker is not None:
                self.worker.stop()

    @property
    def path(self) -> Path:
        """Of the results, without a suffix."""
        name = "".join(c if c.isalnum() else "-" for c in self.results["device"].get("name", "unknown").lower())
        return self.settings.output / (name + ("-tiny" if self.settings.tiny else ""))

    def save(self) -> None:
        """Write all that is known, whole or not at all."""
        self.results["seconds"] = time.monotonic() - self.started
        self.results["problems"] = problems(self.results)
        self.results["provenance"]["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        _write(self.path.with_name(self.path.name + ".json"), json.dumps(self.results, indent=1, default=str))
        _write(self.path.with_name(self.path.name + ".md"), self.text(markdown))

    def text(self, report: Callable[[Results], str]) -> str:
        """Results as text; if rows are not what a report expects, why, as measuring is to go on."""
        try:
            return report(self.results)
        except Exception:
            return f"The tables could not be made; the JSON holds everything.\n\n{traceback.format_exc()}"

    def _start(self, seconds: float = _TO_START) -> None:
        self.worker = _Worker(self.settings)
        message = self.worker.receive(seconds)
        if message is None or message[0] != "ready":
            why = message[1] if message else f"the process ended, or took more than {seconds:.0f} s to start"
            self.worker.stop()
            self.worker = None
            raise Unusable(why)
        self.results["device"] = message[1]

    def _section(self, name: str) -> None:
        """At least the first case, if there is time at all; the others while there is time for the section."""
        section, first = self.results["sections"][name], 0
        ends = self.ready + (self.until - self.ready) * self.settings.share_until(name)
        while time.monotonic() < (ends if first else self.until):
            if self.worker is None:
                try:
                    self._start(min(_TO_START, self.until - time.monotonic()))
                except Unusable as error:
                    section["errors"].append({"case": None, "traceback": str(error)})
                    break
            self.worker.send((name, first, ends - time.monotonic()))
            over, last = self._listen(section)
            if over:
                break
            self._restart()
            if last is None:  # not even the first case began
                break
            first = last + 1
        begun = {case["name"] for case in section["cases"] if case["begun"]}
        section["skipped"] = [
            case["name"] + " (stopped half-way)" * case["stopped"]
            for case in section["cases"]
            if case["stopped"] or not case["begun"]
        ]
        section["state"] = (
            "failed" if section["errors"] else "skipped" if not begun else "partly" if section["skipped"] else "done"
        )

    def _listen(self, section: dict[str, Any]) -> tuple[bool, int | None]:
        """Take down what a section sends, until it is over (true) or the process is gone; the number of the last case
        that began."""
        number: int | None = None
        running = False
        while True:
            message = self.worker.receive(min(self.settings.patience, self.until + _GRACE - time.monotonic()))
            if message is None:
                self._went_silent(section, number, running)
                return False, number
            kind, *content = message
            if kind == "cases" and not section["cases"]:
                section["cases"] = [
                    {"name": case, "begun": False, "stopped": False, "seconds": None} for case in content[0]
                ]
            elif kind == "begin":
                number, running = content[0], True
                section["cases"][number]["begun"] = True
            elif kind == "row":
                section["rows"].append({"case": section["cases"][number]["name"], **content[0]})
            elif kind == "end":
                running = False
                self._case_ended(section, *content)
            elif kind == "over":
                return True, number

    def _went_silent(self, section: dict[str, Any], number: int | None, running: bool) -> None:
        """Why there is no message: time is over, or what was running failed."""
        case = None if number is None else section["cases"][number]
        if self.worker.alive and time.monotonic() >= self.until:
            if running:
                case["stopped"] = True
                self._say(f"  {case['name']}: stopped, time is over")
        elif running or case is None:
            why = self.worker.ending(self.settings.patience)
            section["errors"].append({"case": case and case["name"], "traceback": why})
            self._say(f"  {case and case['name']}: {why}")
        self.save()

    def _case_ended(self, section: dict[str, Any], number: int | None, error: str | None, seconds: float) -> None:
        case = {"name": None} if number is None else section["cases"][number]
        case["seconds"] = seconds
        if error is not None:
            section["errors"].append({"case": case["name"], "traceback": error})
        self._say(f"  {case['name']}: {seconds:.1f} s" + (f", failed: {error.splitlines()[-1]}" if error else ""))
        self.save()

    def _restart(self) -> None:
        self.worker.stop()
        self.worker = None

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:4.0f} s] {text}", file=sys.stderr, flush=True)


class _Worker:
    """The parent's end of the process."""

    def __init__(self, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(settings, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that the process's end closes the pipe

    def send(self, order: Any) -> None:
        with suppress(OSError):  # if it has ended, that is seen when its answer is waited for
            self.connection.send(order)

    def receive(self, seconds: float) -> Any:
        """The next message; None if there is none in time, or the process has ended."""
        try:
            return self.connection.recv() if self.connection.poll(max(0.0, seconds)) else None
        except (EOFError, OSError):
            return None

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def ending(self, patience: float) -> str:
        """Why nothing more came."""
        self.process.join(timeout=1)
        code = self.process.exitcode
        if code is None:
            return f"stopped: it sent nothing for {patience:.0f} s"
        return (
            f"the process was killed by {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"
        )

    def stop(self) -> None:
        """Never waits long: a process that the device does not let go of is left behind."""
        self.send(None)
        self.process.join(timeout=2)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join(timeout=5)
        self.connection.close()


def _write(path: Path, text: str) -> None:
    """Beside its place, then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
