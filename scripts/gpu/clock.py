"""Times of work on a device: events on a GPU, a wall clock on a CPU."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from hf_subquad.planning.mlp_timing import timed

Work = Callable[[], Any]

_FLUSHED = 256 << 20  # bytes, several times the largest L2
_LEAST, _MOST = 5, 50


class Clock:
    """Times in milliseconds.

    On a GPU each is the span between two events, after the L2 cache was overwritten. The host does not wait in between:
    a time is the device's, or the host's where launching takes longer than what is launched.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._flushed = torch.empty(_FLUSHED, dtype=torch.int8, device=device) if self.on_gpu else None

    def median(self, work: Work, total_ms: float = 300.0, most: int = _MOST) -> float:
        """Of several runs, as many as take about `total_ms`, after warm-up."""
        if not self.on_gpu:
            return 1000 * timed(work, torch.device("cpu"))
        work()
        first = _elapsed_ms(*self._run(work))
        runs = [self._run(work) for _ in range(min(max(int(total_ms / max(first, 1e-3)), _LEAST), most))]
        return statistics.median(_elapsed_ms(*events) for events in runs)

    def host_ms(self, work: Work) -> dict[str, float]:
        """Medians, from an idle device: until the host has launched everything, and until the device is done."""
        times = []
        for _ in range(_LEAST + 1):
            self.wait()
            started = time.perf_counter()
            work()
            launched = time.perf_counter() - started
            self.wait()
            times.append((1000 * launched, 1000 * (time.perf_counter() - started)))
        return dict(zip(("host_ms", "ms"), map(statistics.median, zip(*times[1:], strict=True)), strict=True))

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def device_ms(self, work: Work, total_ms: float = 200.0) -> tuple[float | None, str | None]:
        """Median of `work` replayed as a CUDA graph: what it takes without its launches. None, and why, if it cannot
        be captured."""
        if not self.on_gpu:
            return None, "needs CUDA"
        try:
            graph = captured(work)
        except Exception as error:  # what cannot be captured can still be timed
            torch.cuda.synchronize()  # raises if the device is lost
            return None, f"{type(error).__name__}: {error}"
        return self.median(graph.replay, total_ms), None

    def _run(self, work: Work) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Run it between two events."""
        self._flushed.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        return start, end


def _elapsed_ms(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return start.elapsed_time(end)


def captured(work: Work) -> torch.cuda.CUDAGraph:
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        work()
    return graph
