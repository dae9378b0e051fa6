"""The results as Markdown: targets and what was reached, then a table a section. Light to import."""

from collections.abc import Callable, Iterable
from typing import Any

from .targets import step_summary, targets

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


def problems(results: Row) -> list[str]:
    """What failed, by name: cases, and checks that did not pass."""
    found = []
    for name, section in results["sections"].items():
        for error in section["errors"]:
            last = error["traceback"].strip().splitlines()[-1]
            found.append(f"{name}: {error['case'] or 'the section'}: {last}")
        for row in section["rows"]:
            if row.get("passed") is False:
                about = ", ".join(str(row[key]) for key in ("check", "shape", "dtype") if key in row)
                found.append(f"{name}: not passed: {about}")
    return found


def markdown(results: Row) -> str:
    parts = [head(results)]
    for name, section in results["sections"].items():
        if section["rows"]:
            parts += [f"## {name}", *_TABLES[name](section["rows"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def head(results: Row) -> str:
    """What ran, what failed, and the targets."""
    device, sections = results["device"], results["sections"]
    about = ", ".join(f"{key} {value}" for key, value in device.items() if key != "name" and value is not None)
    parts = [f"# {device.get('name', 'unknown device')}", f"{about}. {results['seconds']:.0f} s in all."]
    if results["settings"]["tiny"]:
        parts.append("**Tiny shapes, to try the script: no time here means anything.**")
    parts += [_summary(sections), _problems(results["problems"]), "## Targets", _targets(sections)]
    return "\n\n".join(part for part in parts if part)


def _summary(sections: Row) -> str:
    columns = [
        ("section", lambda r: r["name"]),
        ("state", lambda r: r["state"]),
        ("seconds", lambda r: f"{r['seconds']:.0f}"),
        ("rows", lambda r: str(len(r["rows"]))),
        ("skipped", lambda r: "; ".join(r["skipped"]) or ("all" if r["state"] == "skipped" else "")),
    ]
    return _table([{"name": name, **section} for name, section in sections.items()], columns)


def _problems(found: list[str]) -> str:
    return (
        "\n".join(["**Problems** (tracebacks are in the JSON):", "", *(f"- {each}" for each in found)]) if found else ""
    )


def _targets(sections: Row) -> str:
    columns = [
        ("target", lambda r: r["target"]),
        ("wanted", lambda r: r["wanted"]),
        ("measured", lambda r: r["measured"] or "not measured"),
        ("reached", lambda r: {True: "yes", False: "**no**", None: ""}[r["reached"]]),
    ]
    return _table(targets(sections), columns)


def _device(rows: list[Row]) -> Iterable[str]:
    for row in rows:
        if row.get("what") == "dense GEMM":
            yield f"Dense {row['dtype']} GEMM of {row['size']}^3: {_number(row['ms'])} ms, {row['tflops']:.3g} TFLOP/s."
        elif row.get("what") == "copy":
            yield f"Copy, bytes read and written: {row['gb_per_second']:.4g} GB/s."


def _correctness(rows: list[Row]) -> Iterable[str]:
    yield (
        "Errors are relative, in the Frobenius norm, against PyTorch in float64 on the same values (or against what "
        "the check names); beside them those of PyTorch's own operations in the same dtype."
    )
    known = ("case", "check", "shape", "dtype", "passed", "error", "tolerance", "pytorch_error", "note")
    yield _table(
        [row for row in rows if "check" in row],
        [
            ("check", lambda r: r["check"]),
            ("shape", lambda r: r.get("shape", "")),
            ("dtype", lambda r: r.get("dtype", "")),
            ("passed", lambda r: r.get("note") or ("yes" if r["passed"] else "**NO**")),
            ("error", lambda r: _scientific(r.get("error"))),
            ("tolerance", lambda r: _scientific(r.get("tolerance"))),
            ("PyTorch", lambda r: _scientific(r.get("pytorch_error"))),
            ("more", lambda r: ", ".join(f"{k} {_short(v)}" for k, v in r.items() if k not in known and v is not None)),
        ],
    )


def _layers(rows: list[Row]) -> Iterable[str]:
    rows = [row for row in rows if "subquad_ms" in row]
    yield (
        "Forward and backward of one MLP, milliseconds: medians of interleaved rounds. Ratios above 1 are in favour of "
        "subquad, below 1 **dense wins**. Selection is part of subquad's time, 'graph' its share replayed as a CUDA "
        "graph; 'host' is the time until all of subquad's is launched. The last two are whole layers as CUDA graphs."
    )
    yield _table(
        rows,
        [
            ("shape", lambda r: r["shape"]),
            ("tokens", lambda r: str(r["tokens"])),
            ("neurons", lambda r: f"{r['share']:.1%}"),
            ("tile", lambda r: str(r["tile"])),
            ("full", lambda r: _number(r["full_ms"])),
            ("LoRA", lambda r: _number(r["lora_ms"])),
            ("subquad", lambda r: _number(r["subquad_ms"])),
            ("over full", lambda r: _ratio(r["full_over_subquad"])),
            ("over LoRA", lambda r: _ratio(r["lora_over_subquad"])),
            ("selection", lambda r: f"{r['selection_share']:.1%}"),
            ("graph", lambda r: _percent(r["selection_graph_share"])),
            ("host", lambda r: _number(r["subquad_host_ms"])),
            ("LoRA graph", lambda r: _number(r.get("lora_graph_ms"))),
            ("subquad graph", lambda r: _number(r.get("subquad_graph_ms"))),
        ],
    )
    yield "Memory, in MiB: kept for the backward pass, and the peak beyond what is held before."
    names = ("full", "lora", "subquad")

    def mebibytes(name: str, what: str) -> Column:
        return f"{name} {what}", lambda r: f"{r[f'{name}_{what}_bytes'] / 2**20:.0f}"

    yield _table(
        rows,
        [
            ("shape", lambda r: r["shape"]),
            ("tokens", lambda r: str(r["tokens"])),
            ("neurons", lambda r: f"{r['share']:.1%}"),
            ("tile", lambda r: str(r["tile"])),
            *(mebibytes(name, what) for what in ("kept", "peak") for name in names),
        ],
    )


def _kernels(rows: list[Row]) -> Iterable[str]:
    yield (
        "Milliseconds replayed as a CUDA graph (without launches) where that works. Useful FLOP only: no padding, no "
        "low-rank update. Bytes: each input read once, each output written once."
    )
    yield _table(
        [row for row in rows if "kernel" in row],
        [
            ("shape", lambda r: r["shape"]),
            ("kernel", lambda r: r["kernel"]),
            ("ms", lambda r: _number(r["ms"])),
            ("launched", lambda r: _number(r.get("launched_ms"))),
            ("TFLOP/s", lambda r: _number(r.get("tflops"))),
            ("of dense", lambda r: _percent(r.get("of_dense_rate"))),
            ("GB/s", lambda r: _number(r.get("gb_per_second"))),
            ("PyTorch ms", lambda r: _number(r.get("pytorch_ms"))),
        ],
    )


def _step(rows: list[Row]) -> Iterable[str]:
    first = next((row for row in rows if "batch" in row), None)
    if first is None:
        return
    yield (
        f"Steps of `transformers.Trainer` on {first['layers']} layers ({first['hidden']} x {first['intermediate']}, "
        f"vocabulary {first['vocabulary']}, {first['dtype']}, {first['batch']} tokens a batch), in turns."
    )
    summary = step_summary(rows)
    absent = {row["method"]: row for row in rows if "method" in row and row["method"] not in summary}
    yield _table(
        [*summary.values(), *absent.values()],
        [
            ("method", lambda r: r["method"]),
            ("ms", lambda r: _number(r.get("ms"))),
            ("range", lambda r: " to ".join(map(_number, r.get("range_ms", [])))),
            ("over subquad", lambda r: _ratio(r.get("over_subquad"))),
            ("peak MiB", lambda r: f"{r['peak_bytes'] / 2**20:.0f}" if r.get("peak_bytes") else ""),
            ("what", lambda r: "; ".join(filter(None, [r.get("how"), r.get("note")]))),
        ],
    )


def _profile(rows: list[Row]) -> Iterable[str]:
    for row in rows:
        if row.get("row") == "summary":
            bound = {True: ": launch-bound, the host is slower", False: ": the device is slower"}.get(
                row["launch_bound"], ""
            )
            yield (
                f"**{row['what']}**: {row['launches']} {row['measured']}, device {_number(row['device_ms'])} ms, "
                f"host {_number(row['host_ms'])} ms until all is launched, {_number(row['wall_ms'])} ms in all{bound}."
            )
            kernels = [each for each in rows if each.get("row") == "kernel" and each["what"] == row["what"]]
            yield _table(
                kernels,
                [
                    ("kernel", lambda r: f"`{r['kernel']}`"),
                    ("launches", lambda r: str(r["launches"])),
                    ("ms", lambda r: _number(r["ms"])),
                    ("share", lambda r: _percent(r["share"])),
                ],
            )


def _sweep(rows: list[Row]) -> Iterable[str]:
    for name in dict.fromkeys(row["kernel"] for row in rows if "kernel" in row):
        mine = sorted((row for row in rows if row.get("kernel") == name and "ms" in row), key=lambda row: row["ms"])
        tried = sum(row.get("kernel") == name for row in rows)
        yield f"`{name}`: the best ten of {tried} block shapes, and what the heuristic picks."
        yield _table(
            mine[:10] + [row for row in mine[10:] if row["heuristic"]],
            [
                ("ms", lambda r: _number(r["ms"])),
                ("TFLOP/s", lambda r: _number(r["tflops"])),
                *((key, lambda r, key=key: str(r[key]))
                  for key in ("tokens", "neurons", "features", "group", "warps", "stages")),
                ("heuristic", lambda r: "picked" if r["heuristic"] else ""),
            ],
        )  # fmt: skip


_TABLES: dict[str, Callable[[list[Row]], Iterable[str]]] = {
    "device": _device, "correctness": _correctness, "layers": _layers, "kernels": _kernels, "step": _step,
    "profile": _profile, "sweep": _sweep,
}  # fmt: skip


def _table(rows: list[Row], columns: list[Column]) -> str:
    lines = ["| " + " | ".join(title for title, _ in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (" ".join(str(value(row)).split()).replace("|", "\\|") for _, value in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    """Three digits, without an exponent."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.4f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x" if value >= 1 else f"**{value:.2f}x**"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _scientific(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.1e}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
