"""Section `profile`: where device time of an MLP's forward and backward goes, and whether the host keeps up."""

from collections import defaultdict
from collections.abc import Iterator

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .bench import Bench, Case, Row

_SHOWN = 15


def cases(bench: Bench) -> list[Case]:
    return [(f"{bench.main.name} MLP", lambda: _mlp(bench))]


def _mlp(bench: Bench) -> Iterator[Row]:
    layer = bench.sparse_mlp(bench.main, bench.dtype)
    x, grad = bench.batch(bench.main)

    def work() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x).backward(grad)

    for _ in range(1 if bench.tiny else 3):
        work()
    host_ms, wall_ms = bench.clock.host_ms(work), bench.clock.median(work, total_ms=100, most=10)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.on_gpu) as profiler:
        work()
        bench.clock.wait()
    times: dict[str, list[float]] = defaultdict(list)
    kind = DeviceType.CUDA if bench.on_gpu else DeviceType.CPU  # on a CPU operations in place of kernels
    for event in profiler.events():
        if event.device_type == kind and not getattr(event, "is_user_annotation", False):
            us = event.time_range.elapsed_us() if bench.on_gpu else event.self_cpu_time_total
            times[event.name].append(us / 1000)
    total = sum(map(sum, times.values()))
    yield {
        "kernel": "all",
        "launches": sum(map(len, times.values())),
        "ms": total,
        "host_ms": host_ms,
        "wall_ms": wall_ms,
    }
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))[:_SHOWN]:
        yield {
            "kernel": name[:120],
            "launches": len(each),
            "ms": sum(each),
            "share": sum(each) / total if total else 0.0,
        }
