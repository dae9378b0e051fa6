"""Section `sweep`: blocks of `gathered_up` and `gathered_down` at the main point, and what the heuristic picks."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from hf_subquad.ops.backends import triton_products
from hf_subquad.ops.backends.triton_products import Blocks

from .bench import Bench, Case, Row
from .kernels import problem_of
from .problem import Problem


def cases(bench: Bench) -> list[Case]:
    return [
        ("heuristic", lambda: _heuristic(bench)),
        *((f"{name}, batch {i}", partial(_batch, bench, name, blocks))
          for i, (name, blocks) in enumerate(_batches(bench))),
    ]  # fmt: skip


def _batches(bench: Bench) -> Iterator[tuple[str, list[Blocks]]]:
    """Turn by turn some configurations of each, so that little time still tells of both."""
    size = 2 if bench.tiny else 8
    by_name = {name: _configurations(bench, name) for name in ("gathered_up", "gathered_down")}
    for start in range(0, max(map(len, by_name.values())), size):
        for name, blocks in by_name.items():
            if blocks[start : start + size]:
                yield name, blocks[start : start + size]


def _configurations(bench: Bench, name: str) -> list[Blocks]:
    """Outputs are neurons in `gathered_up` and features in `gathered_down`; the step goes along the other."""
    if bench.tiny:
        return [Blocks(16, 32, 32, group=2), Blocks(32, 32, 32, group=2)]
    grid = itertools.product((16, 8, 32), (128, 64), (256, 128), (64, 128, 32), (4, 3), (8, 4))
    found = []
    for group, tokens, outputs, step, stages, warps in grid:
        if stages * (tokens + outputs) * step * 2 > 227 * 1024 or tokens * outputs > 4096 * warps:
            continue  # beyond shared memory, or registers
        neurons, features = (outputs, step) if name == "gathered_up" else (step, outputs)
        found.append(Blocks(tokens, neurons, features, group=group, warps=warps, stages=stages))
    return found


def _heuristic(bench: Bench) -> Iterator[Row]:
    p = _problem(bench)
    for name, picked in (
        ("gathered_up", triton_products._gathered_up_blocks(p.x, p.size.slots, p.size.active, 1)),
        ("gathered_down", triton_products._gathered_down_blocks(p.a[0], p.size.slots, p.size.width)),
    ):
        yield _timed(bench, name, _WORKS[name], p, picked) | {"heuristic": True}


def _batch(bench: Bench, name: str, blocks: list[Blocks]) -> Iterator[Row]:
    for each in blocks:
        yield _timed(bench, name, _WORKS[name], _problem(bench), each)


def _timed(bench: Bench, name: str, work: Callable[[Problem, Blocks], Any], p: Problem, blocks: Blocks) -> Row:
    row: Row = {"kernel": name, **asdict(blocks), "heuristic": False}
    try:
        ms = bench.clock.median(lambda: work(p, blocks), total_ms=20, most=15)
    except Exception as error:  # blocks that do not fit are an answer too
        bench.clock.wait()  # raises if the device is lost
        return row | {"note": f"{type(error).__name__}: {error}"[:200]}
    flops = 2.0 * p.size.tiles * p.size.slots * p.size.active * p.size.width
    return row | {"ms": ms, "tflops": flops / ms / 1e9}


def _gathered_up(p: Problem, blocks: Blocks) -> Any:
    m = p.matrices[0]
    return triton_products.gathered_up(p.x, p.tiles.entries, p.neurons, [m.rows], [m.bias], [m.u], [p.x_low], blocks)


def _gathered_down(p: Problem, blocks: Blocks) -> Any:
    m = p.outputs[0]
    return triton_products.gathered_down(
        p.a[:1], p.tiles.entries, p.neurons, [m.rows], [p.x_low], [m.v], m.bias, blocks
    )  # fmt: skip


_WORKS: dict[str, Callable[[Problem, Blocks], Any]] = {"gathered_up": _gathered_up, "gathered_down": _gathered_down}


def _problem(bench: Bench) -> Problem:
    return bench.once("problem", lambda: problem_of(bench, bench.sizes.main))
