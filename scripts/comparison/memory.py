"""Peak memory of this process (or of its GPU memory), over stretches that the caller marks."""

import resource
import sys
from pathlib import Path

import torch


class PeakMemory:
    """Largest memory use in bytes between `start` and `stop`, over all such stretches.

    On a GPU: memory allocated by torch. On Linux: resident memory of the process, Python and libraries included.
    Elsewhere the kernel cannot forget an earlier peak, so the peak counts from the start of the process.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.bytes = 0

    def start(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark, nothing else

    def stop(self) -> None:
        self.bytes = max(self.bytes, torch.cuda.max_memory_allocated() if self.on_gpu else _resident("VmHWM"))


def resident_bytes() -> int:
    """Resident memory of this process now (on Linux; elsewhere its peak)."""
    return _resident("VmRSS")


def _resident(field: str) -> int:
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
