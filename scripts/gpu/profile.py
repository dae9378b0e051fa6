"""Section `profile`: where the time of an MLP's forward and backward goes: on the host, and on the device by kernel."""

import re
from collections.abc import Iterator
from functools import partial

import torch
from benchmarks.layer import Subjects
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .bench import Bench, Case, Row
from .clock import Work

_GATHERED = re.compile(r"^_(gathered|per_)")
_DENSE = re.compile(r"gemm|nvjet|cutlass|xmma|::(add)?b?mm")


def cases(bench: Bench) -> list[Case]:
    return [
        (f"{mlp}, {'classes' if classes else 'tiles'}", partial(_layer, bench, mlp, classes))
        for mlp in bench.mlps
        for classes in (False, True)
    ]


def _layer(bench: Bench, mlp: str, classes: bool) -> Iterator[Row]:
    subjects = Subjects(bench.layer(mlp, classes))  # without classes: m ** 0.8 neurons
    ways = subjects.ways[1:]  # all but full training

    def step(layer: torch.nn.Module) -> None:
        layer.zero_grad(set_to_none=True)
        subjects.x.grad = None
        layer(subjects.x).backward(subjects.gradient)

    for name in ways:
        with subjects.way(name) as layer:
            times = bench.clock.host_ms(partial(step, layer))
            whole = by_kernel(bench, partial(step, layer))
            selection = by_kernel(bench, subjects.select) if name in subjects.budgets else {}
        others = {kernel: ms - selection.get(kernel, (0, 0.0))[1] for kernel, (_, ms) in whole.items()}
        total, selecting = (sum(ms for _, ms in kernels.values()) for kernels in (whole, selection))
        gathered, dense = (sum(ms for kernel, ms in others.items() if of.search(kernel)) for of in (_GATHERED, _DENSE))
        longest = sorted(whole, key=lambda kernel: -whole[kernel][1])[:12]
        yield {
            "mlp": mlp, "way": name, **times, "launches": sum(count for count, _ in whole.values()),
            "device_ms": total, "selection_ms": selecting, "gathered_ms": gathered, "dense_ms": dense,
            "rest_ms": total - selecting - gathered - dense, "longest": {kernel: whole[kernel] for kernel in longest},
        }  # fmt: skip
    for name in ways:  # last: a capture that fails may take the process with it
        budget = subjects.budgets.get(name)
        if budget is not None and budget.gradient < 1:
            yield {"mlp": mlp, "way": name, "graph_ms": None, "graph_note": "it waits for the device to count rows"}
            continue
        with subjects.way(name) as layer:
            graph_ms, why_not = bench.clock.device_ms(partial(step, layer))
        yield {"mlp": mlp, "way": name, "graph_ms": graph_ms, "graph_note": why_not}


def by_kernel(bench: Bench, work: Work) -> dict[str, tuple[int, float]]:
    """Launches and milliseconds of each kernel in `work`; on a CPU calls and milliseconds of each operation."""
    work()
    device, kind = (ProfilerActivity.CUDA, DeviceType.CUDA) if bench.on_gpu else (ProfilerActivity.CPU, DeviceType.CPU)
    with profile(activities=[device]) as profiled:
        work()
        bench.clock.wait()
    return {
        event.key: (event.count, (event.self_device_time_total if bench.on_gpu else event.self_cpu_time_total) / 1000)
        for event in profiled.key_averages()
        if event.device_type == kind and not event.is_user_annotation
    }
