"""Times of work on a device: events on a GPU, a wall clock on a CPU."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

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
            return _wall_ms(work)
        work()
        rounds = min(max(int(total_ms / max(self._span(work)(), 1e-3)), _LEAST), most)
        return statistics.median([read() for read in [self._span(work) for _ in range(rounds)]])

    def device_ms(self, work: Work, total_ms: float = 200.0) -> tuple[float | None, str | None]:
        """Median of `work` replayed as a CUDA graph: what it takes without its launches. None, and why, if it cannot
        be captured."""
        if not self.on_gpu:
            return None, "needs CUDA"
        try:
            graph, _ = captured(work)
        except Exception as error:  # what cannot be captured can still be timed
            torch.cuda.synchronize()  # raises if the device is lost
            return None, f"{type(error).__name__}: {error}"
        return self.median(graph.replay, total_ms), None

    def _span(self, work: Work) -> Callable[[], float]:
        """Run it once; the returned function waits for it and tells its milliseconds."""
        self._flushed.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()

        def read() -> float:
            end.synchronize()
            return start.elapsed_time(end)

        return read


def captured(work: Work) -> tuple[torch.cuda.CUDAGraph, Any]:
    """`work` as a CUDA graph, and what it returned while it was captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


def _wall_ms(work: Work) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)
