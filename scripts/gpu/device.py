"""Section `device`: what it is, and its two measured ceilings."""

import subprocess
from collections.abc import Iterator

import torch
from benchmarks.layer import DTYPES

from .bench import Bench, Case, Row


def cases(bench: Bench) -> list[Case]:
    return [("facts", lambda: _facts(bench)), ("dense GEMM", lambda: _gemm(bench)), ("copy", lambda: _copy(bench))]


def _facts(bench: Bench) -> Iterator[Row]:
    if not bench.on_gpu:
        yield {"what": "facts", "name": "CPU"}
        return
    about = torch.cuda.get_device_properties(bench.device)
    yield {
        "what": "facts", "name": about.name, "capability": f"{about.major}.{about.minor}",
        "memory_bytes": about.total_memory, "multiprocessors": about.multi_processor_count,
        "cuda": torch.version.cuda, "driver": _driver(),
    }  # fmt: skip


def _gemm(bench: Bench) -> Iterator[Row]:
    size = 64 if bench.tiny else 8192
    left, right = (torch.randn(size, size, device=bench.device, dtype=DTYPES[bench.dtype]) for _ in range(2))
    ms = bench.clock.median(lambda: left @ right)
    rate = 2 * size**3 / ms / 1e9
    yield {"what": "dense GEMM", "size": size, "dtype": bench.dtype, "ms": ms, "tflops": rate}


def _copy(bench: Bench) -> Iterator[Row]:
    values = 1 << (16 if bench.tiny else 30)
    source = torch.randint(0, 255, (values,), device=bench.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    ms = bench.clock.median(lambda: target.copy_(source))
    yield {"what": "copy", "bytes": 2 * values, "ms": ms, "gb_per_second": 2 * values / ms / 1e6}


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
