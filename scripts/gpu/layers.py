"""Sections `layers` and `step`: the benchmarks of one MLP and of a Trainer step, on this device."""

import argparse
from collections.abc import Iterator
from functools import partial

from benchmarks import layer
from compare_vanilla import compare
from comparison.settings import RunSettings, Shape

from .bench import Bench, Case, Row, dtype_name
from .bench import Shape as MlpShape

_SHARES = (None, 0.25, 0.125, 0.06)  # None: m ** 0.8 neurons


def layer_cases(bench: Bench) -> list[Case]:
    shares = _SHARES[:1] if bench.tiny else _SHARES
    counts = (bench.tokens,) if bench.tiny else (8192, 2048, 16384)
    return [
        (f"{shape.name}, {count} tokens, {share or 'm^0.8'}", partial(_layer, bench, shape, count, share))
        for count in counts
        for shape in (bench.main, bench.other)
        for share in shares
    ]


def _layer(bench: Bench, shape: MlpShape, count: int, share: float | None) -> Iterator[Row]:
    point = argparse.Namespace(
        tokens=count, hidden=shape.hidden, intermediate=shape.intermediate, gated=shape.gated, active=share,
        tile=bench.tile, dtype=dtype_name(bench.dtype), rank=bench.rank, device=bench.device.type,
        rounds=3 if bench.tiny else 20, warmup=1 if bench.tiny else 3,
    )  # fmt: skip
    yield {"shape": shape.name, **layer.bench(point)}


def step_cases(bench: Bench) -> list[Case]:
    return [("vanilla, LoRA and subquad in turns", lambda: _step(bench))]


def _step(bench: Bench) -> Iterator[Row]:
    """Trainer steps on four layers of Llama-3-8B's size."""
    shape = Shape(32, 96, 1, 64, "llama") if bench.tiny else Shape(4096, 14336, 4, 32000, "llama")
    runs = {
        method: RunSettings(
            method=method, learning_rate=1e-5, shape=shape, device=bench.device.type, dtype=dtype_name(bench.dtype),
            batch_size=2 if bench.tiny else 8, seq_length=12 if bench.tiny else 1024, steps=2, threads=1,
            rounds=1 if bench.tiny else 3, turn_steps=1 if bench.tiny else 5, rank=bench.rank,
            subquad={"active": bench.main.active, "tile_size": bench.tile, "layers_to_transform": "all"},
        )
        for method in ("vanilla", "lora", "subquad")
    }  # fmt: skip
    report = compare(runs)
    for name, method in report["methods"].items():
        of_mlps = method["mlp_seconds_median"]
        yield {
            "method": name,
            "ms": 1000 * method["step_seconds_median"],
            "tokens_per_second": method["tokens_per_second"],
            "mlp_ms": of_mlps and 1000 * of_mlps,
            "peak_bytes": method["peak_memory_bytes"],
            "over_subquad": report.get(f"speedup_vs_{name}"),
        }
