"""Memory of processes, of the GPU and of the machine, in bytes."""

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path


class PeakMemory:
    """Largest memory use of this process between `start` and `stop`, over all such stretches.

    On a GPU: memory allocated by torch. On Linux: resident memory of the process, Python and libraries included.
    Elsewhere the kernel cannot forget an earlier peak, so the peak counts from the start of the process.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.bytes = 0

    def start(self) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark, nothing else

    def stop(self) -> None:
        if self.on_gpu:
            import torch

            now = torch.cuda.max_memory_allocated()
        else:
            now = _read("/proc/self/status", "VmHWM") or _peak_of_self()
        self.bytes = max(self.bytes, now)


def resident_bytes() -> int:
    """Resident memory of this process now (on Linux; elsewhere its peak)."""
    return _read("/proc/self/status", "VmRSS") or _peak_of_self()


def give_back_freed() -> None:
    """Return memory that this process has freed to the system (on Linux), so that it does not count as resident."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)


def peak_bytes_of(pid: int | None) -> int:
    """Peak of the resident memory of another process so far; 0 where it cannot be read."""
    return _read(f"/proc/{pid}/status", "VmHWM")


def memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes() -> int:
    """Memory that a new program could take now; on systems other than Linux, all there is."""
    return _read("/proc/meminfo", "MemAvailable") or memory_bytes()


def _read(path: str, field: str) -> int:
    """A field in kilobytes, as bytes; 0 where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


def _peak_of_self() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
