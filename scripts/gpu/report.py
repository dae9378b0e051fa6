"""The results as Markdown: what ran, what failed, and a table a section. Light to import."""

from typing import Any

Row = dict[str, Any]

# Columns by section; a section's rows may have more, which are in the JSON.
COLUMNS = {
    "device": ("what", "name", "capability", "torch", "triton", "driver", "size", "dtype", "ms", "tflops",
               "gb_per_second"),
    "correctness": ("file", "check", "passed"),
    "layers": ("shape", "tokens", "share", "dense_full_seconds", "dense_lora_seconds", "subquad_seconds",
               "speedup_vs_full", "speedup_vs_lora", "selection_share", "dense_lora_peak_bytes", "subquad_peak_bytes"),
    "kernels": ("shape", "kernel", "ms", "launched_ms", "tflops", "of_dense_rate", "gb_per_second", "pytorch_ms"),
    "step": ("method", "ms", "mlp_ms", "tokens_per_second", "peak_bytes", "over_subquad"),
}  # fmt: skip
NOTES = {
    "layers": "Forward and backward of one MLP, medians of interleaved rounds. Below 1 **dense wins**.",
    "kernels": "Milliseconds replayed as a CUDA graph (without launches) where that works. Useful FLOP only.",
    "step": "Trainer steps on four layers; over_subquad is how many times longer than subquad's a step takes.",
}


def problems(results: Row) -> list[str]:
    """What failed, by name: cases, and checks that did not pass."""
    found = []
    for name, section in results["sections"].items():
        for error in section["errors"]:
            found.append(f"{name}: {error['case'] or 'the section'}: {error['traceback'].strip().splitlines()[-1]}")
        for row in section["rows"]:
            if row.get("passed") is False:
                about = ", ".join(str(row[key]) for key in ("file", "check"))
                found.append(f"{name}: not passed: {about}")
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
