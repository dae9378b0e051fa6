"""Section `step`: steps of the Trainer on a few layers of large models, with random weights."""

import gc
import importlib.util
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comparison.measure import turn
from comparison.random_rows import GSM8K
from comparison.settings import RunSettings, Shape
from transformers.models.llama import modeling_llama

from hf_subquad import Plan
from hf_subquad.plan import LayerPlan

from .bench import Bench, Case, Row

_LAYERS = 4
# Hidden features, neurons, heads of keys and values where a head has 64 features, layers, words. The words are cut
# with the layers, so that the head takes the share of a step that it takes in the whole model.
_MODELS = {"Llama-3-8B": (4096, 14336, 16, 32, 128256), "Llama-3.2-1B": (2048, 8192, 8, 16, 128256)}
_TINY = {"tiny": (64, 96, 1, _LAYERS, 64)}
_GRADIENT = 0.97  # as a plan for SmolLM2 chose at a tolerance of 0.0007
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "vanilla": ("vanilla", {}),
    "LoRA": ("lora", {}),
    **({"LoRA with Liger": ("lora", {"liger": True})} if importlib.util.find_spec("liger_kernel") else {}),
    "MLPs": ("subquad", {"head_megabytes": 0}),
    "MLPs and head": ("subquad", {}),
}


def cases(bench: Bench) -> list[Case]:
    every = [(batch, again) for batch in ("padded", "packed") for again in (False, True)]
    return [
        (f"{model}, {batch}{', gradient checkpointing' * again}", partial(_steps, bench, model, batch, again))
        for batch, again in ([("padded", False), ("packed", True)] if bench.tiny else every)
        for model in (_TINY if bench.tiny else _MODELS)
    ]


def _steps(bench: Bench, model: str, batch: str, again: bool) -> Iterator[Row]:
    hidden, neurons, kv_heads, layers, words = (_TINY | _MODELS)[model]
    padding, context = GSM8K if batch == "padded" else (0.0, 0.0)
    shape = Shape(hidden, neurons, _LAYERS, words * _LAYERS // layers, "llama", padding, context, kv_heads)
    rows, length, untimed, steps, profiled = (2, 16, 1, 1, 1) if bench.tiny else (16, 512, 3, 5, 2)
    common = {
        "learning_rate": 1e-5, "shape": shape, "device": bench.device.type, "dtype": bench.dtype, "autocast": True,
        "gradient_checkpointing": again, "steps": 8, "batch_size": rows, "seq_length": length, "rank": bench.rank,
        "untimed_steps": untimed, "turn_steps": steps, "threads": torch.get_num_threads(),
        "profile_steps": 0 if again else profiled,  # a forward that is computed again may stop inside of an MLP
    }  # fmt: skip
    names = [f"model.layers.{i}.mlp" for i in range(_LAYERS)]
    mlps = {name: [f"{name}.{path}_proj" for path in ("gate", "up", "down")] for name in names}
    ms: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder, "plan.json")
        _plan(names, shape, bench).save(plan)
        for name, (method, more) in _METHODS.items():
            special = {"subquad": {"tile_size": bench.tile, **more}, "plan": str(plan)} if method == "subquad" else more
            row: Row = {"model": model, "batch": batch, "checkpointing": again, "method": name}
            try:
                with _names_restored():
                    result = turn((RunSettings(method=method, **common, **special), mlps), lambda progress: None)
            except torch.OutOfMemoryError:
                yield row | {"note": "does not fit"}
                continue
            finally:
                gc.collect()
                torch.cuda.empty_cache()
            seconds = [step["seconds"] for step in result["steps"]]
            ms[name] = 1000 * statistics.median(seconds)
            of_mlps = [1000 * step["mlp_seconds"] for step in result["profile"]]
            yield row | {
                "ms": ms[name], "step_seconds": seconds, "mlp_ms": statistics.median(of_mlps) if of_mlps else None,
                "tokens_per_second": statistics.median(step["tokens"] / step["seconds"] for step in result["steps"]),
                "peak_bytes": result["peak_memory_bytes"], "digest": result["digest"],
                **{f"over_{other}": ms[other] / ms[name] for other in ms if not other.startswith("MLPs")},
            }  # fmt: skip


@contextmanager
def _names_restored() -> Iterator[None]:
    """Context manager: Liger rebinds names in transformers' module, for all models that are made after it."""
    before = dict(vars(modeling_llama))
    try:
        yield
    finally:
        vars(modeling_llama).update(before)


def _plan(mlps: list[str], shape: Shape, bench: Bench) -> Plan:
    """Every neuron for predicted tokens; for context all in the lower half of the layers, and none above."""
    m, half = shape.intermediate, len(mlps) // 2
    unmeasured = {"error": 0.0, "context_error": 0.0, "full_ms": 1.0, "dense_ms": 1.0, "sparse_ms": 1.0}
    return Plan(
        tolerance=0.003, loss_increase=0.0, gradient_cosine=1.0, step_ms=float(len(mlps)), planning_seconds=0.0,
        padding_share=shape.padding, context_share=shape.context, tokens=bench.tokens, dtype=bench.dtype,
        device=bench.device.type, tile_size=bench.tile, tile_order="similar", saved_elsewhere_ms=0.0,
        layers=tuple(
            LayerPlan(name, m, m, m * (i < half), _GRADIENT, **unmeasured) for i, name in enumerate(mlps)
        ),
    )  # fmt: skip
