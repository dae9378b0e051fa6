"""Section `profile`: where device time goes, and whether the host keeps up."""

import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from . import step
from .bench import Bench, Case, Row
from .clock import Work
from .mlps import forward_backward, mlp, sparse, tokens

_SHOWN = 15


def cases(bench: Bench) -> list[Case]:
    counts = bench.sizes.tokens[:1] if bench.tiny else (bench.sizes.tokens[0], bench.sizes.tokens[-1])
    return [
        *((f"MLP, {count} tokens", partial(_mlp, bench, count)) for count in counts),
        ("selection", lambda: _selection(bench)),
        ("Trainer step", lambda: _trainer_step(bench)),
    ]


def _mlp(bench: Bench, count: int) -> Iterator[Row]:
    shape = bench.sizes.main
    layer = mlp(bench, shape, "subquad")
    sparse(layer).set_active(shape.paper_active)
    x, grad = tokens(bench, shape, count)
    yield from _profiled(bench, f"{shape.name} MLP, {count} tokens", lambda: forward_backward(layer, x, grad))


def _selection(bench: Bench) -> Iterator[Row]:
    shape = bench.sizes.main
    chosen = sparse(mlp(bench, shape, "subquad"))
    x, _ = tokens(bench, shape, bench.sizes.tokens[0])
    work = partial(chosen.index.select, x.detach(), shape.paper_active, bench.sizes.tile, "similar")
    yield from _profiled(bench, f"{shape.name} selection, {len(x)} tokens", work)


def _profiled(bench: Bench, what: str, work: Work) -> Iterator[Row]:
    for _ in range(1 if bench.tiny else 3):
        work()
    host_ms = bench.clock.host_ms(work)
    wall_ms = bench.clock.median(work, total_ms=100, most=10)
    with _profiler(bench) as profiler:
        work()
        bench.clock.wait()
    yield from _rows(bench, what, profiler, host_ms, wall_ms)


class _ProfiledStep(TrainerCallback):
    """Profiles the last step; the one before it, timed on the host, is preserve_mode_and_rng."""

    def __init__(self, bench: Bench, steps: int) -> None:
        self.bench, self.steps = bench, steps
        self.profiler: Any = None
        self.host_ms = self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()
        if state.global_step == self.steps - 1:
            self.profiler = _profiler(self.bench)
            self.profiler.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profiler is None:
            self.host_ms = 1000 * (time.perf_counter() - self._started)
        else:
            self.bench.clock.wait()
            self.profiler.__exit__(None, None, None)


def _trainer_step(bench: Bench) -> Iterator[Row]:
    steps = 2 if bench.tiny else 5
    each = bench.once("candidate subquad", lambda: step.candidate(bench, "subquad"))
    callback = _ProfiledStep(bench, steps)
    trainer = step.train(bench, each, steps, [callback])
    wall_ms = 1000 * trainer.measured.steps[-2]["seconds"]
    yield from _rows(bench, "Trainer step, subquad", callback.profiler, callback.host_ms, wall_ms)


def _profiler(bench: Bench) -> Any:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.on_gpu
    return profile(activities=activities)


def _rows(bench: Bench, what: str, profiler: Any, host_ms: float, wall_ms: float) -> Iterator[Row]:
    """A summary, then the kernels that take most time; on a CPU operations in place of kernels."""
    times: dict[str, list[float]] = defaultdict(list)
    kind = DeviceType.CUDA if bench.on_gpu else DeviceType.CPU
    for event in profiler.events():
        if event.device_type == kind and not getattr(event, "is_user_annotation", False):
            us = event.time_range.elapsed_us() if bench.on_gpu else event.self_cpu_time_total
            times[event.name].append(us / 1000)
    total = sum(map(sum, times.values()))
    launches = sum(map(len, times.values()))
    yield {
        "what": what, "row": "summary", "launches": launches, "device_ms": total, "host_ms": host_ms,
        "wall_ms": wall_ms, "launch_bound": host_ms > total if bench.on_gpu else None,
        "measured": "kernels" if bench.on_gpu else "CPU operations",
    }  # fmt: skip
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))[:_SHOWN]:
        yield {
            "what": what, "row": "kernel", "kernel": name[:120], "launches": len(each), "ms": sum(each),
            "share": sum(each) / total if total else 0.0,
        }  # fmt: skip
