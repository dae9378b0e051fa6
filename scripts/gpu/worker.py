"""The process that holds the device: runs the sections it is told to, and sends every row as soon as it is there."""

import gc
import importlib
import importlib.util
import os
import sys
import time
import traceback
import types
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .settings import Settings

_MODULES = {"device": "facts", "profile": "profiling"}  # where the name of a section is taken
_ROOT = Path(__file__).resolve().parents[2]


def serve(settings: Settings, connection: Connection) -> None:
    """Say what the device is, then run what comes: (section, number of its first case, seconds for it).

    Sends ("ready", facts), or ("unusable", why) and ends; and for each section ("cases", names), then of each case
    ("begin", number), ("row", row)..., ("end", number, error or None, seconds), at last ("over",).
    """
    try:
        bench, facts = _prepare(settings)
    except _Unusable as error:
        connection.send(("unusable", str(error)))
        return
    except BaseException:
        connection.send(("unusable", traceback.format_exc()))
        return
    connection.send(("ready", facts))
    try:
        while (order := connection.recv()) is not None:
            _section(bench, settings, connection, *order)
    except (EOFError, OSError):  # the parent is gone
        os._exit(1)


class _Unusable(Exception):
    """There is nothing to run on; the message says why."""


def _prepare(settings: Settings) -> tuple[Any, dict[str, Any]]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path[:0] = [str(_ROOT), str(_ROOT / "scripts")]
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise _Unusable(
            "PyTorch finds no CUDA device; without one only --tiny --device cpu runs, with TRITON_INTERPRET=1"
        )
    if importlib.util.find_spec("triton") is None:
        raise _Unusable("triton is not installed: pip install triton")
    faiss = _stand_in_for_faiss()
    from .bench import Bench
    from .facts import facts

    device = torch.device("cuda", torch.cuda.current_device()) if settings.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    bench = Bench(device, settings.tiny, settings.vocabulary)
    return bench, facts(device) | {"faiss": faiss}


def _stand_in_for_faiss() -> str:
    """An empty module in place of a missing faiss, which the library imports for queries that nothing here makes."""
    if importlib.util.find_spec("faiss") is not None:
        return "installed"
    module: Any = types.ModuleType("faiss")
    module.METRIC_INNER_PRODUCT = 0
    module.index_factory = lambda *_: None
    sys.modules["faiss"] = module
    return "not installed; an empty module stands in for it"


def _section(bench: Any, settings: Settings, connection: Connection, name: str, first: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    try:
        module = importlib.import_module(f"gpu.{_MODULES.get(name, name)}")
        cases = [*_broken(settings, name), *module.cases(bench)]
    except BaseException:
        connection.send(("cases", []))
        connection.send(("end", None, traceback.format_exc(), 0.0))
        connection.send(("over",))
        return
    connection.send(("cases", [case for case, _ in cases]))
    for number, (_, run) in enumerate(cases):
        if number < first:
            continue
        if number > first and time.monotonic() >= until:
            break
        connection.send(("begin", number))
        started = time.monotonic()
        error = _run(run, connection)
        connection.send(("end", number, error, time.monotonic() - started))
        if error is not None and not _device_works(bench):
            connection.close()
            os._exit(1)  # in this process every further call would fail
    connection.send(("over",))


def _run(run: Any, connection: Connection) -> str | None:
    """Send a case's rows; its traceback if it fails."""
    try:
        for row in run():
            connection.send(("row", row))
    except (EOFError, BrokenPipeError):
        raise
    except Exception:
        return traceback.format_exc()
    return None


def _device_works(bench: Any) -> bool:
    import torch

    gc.collect()
    try:
        if bench.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.ones(1, device=bench.device).item()
    except RuntimeError:
        return False
    return True


def _broken(settings: Settings, section: str) -> Iterator[Any]:
    """A first case that goes wrong, if `settings.broken` asks for it."""
    how = settings.broken.get(section)

    def fail() -> Iterator[dict[str, Any]]:
        yield {"what": "a case that goes wrong on purpose"}
        if how == "exit":
            os._exit(3)
        if how == "hang":
            time.sleep(3600)
        raise RuntimeError("made to fail")

    if how:
        yield "broken on purpose", fail
