"""The results as Markdown: what ran, what failed, and a table a section. Light to import."""

from typing import Any

Row = dict[str, Any]

# Columns by section; a section's rows may have more, which are in the JSON.
COLUMNS = {
    "device": ("what", "name", "capability", "driver", "size", "dtype", "ms", "tflops", "gb_per_second"),
    "correctness": ("file", "check", "passed"),
    "layers": ("mlp", "tokens", "budget", "share", "dense_full_seconds", "dense_lora_seconds", "subquad_seconds",
               "speedup_vs_full", "speedup_vs_lora", "selection_share", "dense_lora_peak_bytes", "subquad_peak_bytes"),
    "step": ("model", "batch", "checkpointing", "method", "ms", "mlp_ms", "tokens_per_second", "peak_bytes",
             "over_vanilla", "over_LoRA", "over_LoRA with Liger", "note"),
    "profile": ("mlp", "way", "host_ms", "ms", "graph_ms", "device_ms", "launches", "selection_ms", "gathered_ms",
                "dense_ms", "rest_ms"),
    "kernels": ("mlp", "kernel", "ms", "launched_ms", "tflops", "of_dense_rate", "gb_per_second", "pytorch_ms"),
}  # fmt: skip
NOTES = {
    "layers": "One MLP, medians of interleaved rounds. Below 1 **dense wins**. `share`: of a dense forward's products.",
    "step": "Trainer steps on four layers, with as many words as are four layers' part of the model. MLPs: all neurons "
    "for predicted tokens, none for context in the upper half of the layers, 97% of the gradient. `over_...`: how "
    "many times longer the other method's step takes.",
    "profile": "One MLP: until the host has launched it, until it is done, as a CUDA graph; its kernels' time by kind.",
    "kernels": "Milliseconds replayed as a CUDA graph (without launches) where that works. Useful FLOP only.",
}


def problems(results: Row) -> list[str]:
    """What failed, by name: cases, and checks that did not pass."""
    found = []
    for name, section in results["sections"].items():
        for error in section["errors"]:
            found.append(f"{name}: {error['case'] or 'the section'}: {error['traceback'].strip().splitlines()[-1]}")
        for row in section["rows"]:
            if row.get("passed") is False:
                found.append(f"{name}: not passed: {row['file']}, {row['check']}")
    return found


def markdown(results: Row) -> str:
    sections = results["sections"]
    parts = [f"# {results['device'] or 'unknown device'}", f"{results['seconds']:.0f} s in all."]
    if results["settings"]["tiny"]:
        parts.append("**Tiny shapes, to try the script: no time here means anything.**")
    states = [{"section": name, **section, "rows": len(section["rows"])} for name, section in sections.items()]
    parts.append(_table(states, ("section", "state", "seconds", "rows")))
    if results["problems"]:
        parts.append(
            "\n".join(["**Problems** (tracebacks are in the JSON):", "", *(f"- {p}" for p in results["problems"])])
        )
    for name, section in sections.items():
        if section["rows"]:
            parts += [f"## {name}", *([NOTES[name]] if name in NOTES else []), _table(section["rows"], COLUMNS[name])]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[Row], columns: tuple[str, ...]) -> str:
    used = [name for name in columns if any(row.get(name) is not None for row in rows)]
    lines = ["| " + " | ".join(used) + " |", "|" + "---|" * len(used)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(name)).replace("|", "\\|") for name in used) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**NO**"
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
