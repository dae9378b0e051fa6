"""Tables, pictures and files of reports, made from rows only."""

import argparse
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from environment import provenance


class Panel(NamedTuple):
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]  # (x, y) by the name of the line
    x_scale: str = "linear"  # or "log"
    y_scale: str = "linear"


class Bars(NamedTuple):
    y_label: str
    parts: Mapping[str, Mapping[str, float]]  # heights by the bar's name, by the part, which are stacked


def text_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Columns, the first aligned left, the others right."""
    cells = [list(head), *map(list, lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    )


def plots_available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(panels: Sequence[Panel | Bars], title: str, path: Path) -> None:
    """A PNG with one panel beside the other; a line has the same colour in each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(1, len(panels), figsize=(7.5 * len(panels), 4.6), layout="constrained", squeeze=False)
    names = list(dict.fromkeys(name for panel in panels if isinstance(panel, Panel) for name in panel.lines))
    styles = {name: (f"C{i % 10}", "os^vD<>ph*"[i % 10], "-" if i < 10 else "--") for i, name in enumerate(names)}
    for axes, panel in zip(grid[0], panels, strict=True):
        if isinstance(panel, Bars):
            _draw_bars(axes, panel)
            continue
        for name, points in panel.lines.items():
            colour, marker, dashes = styles[name]
            axes.plot(*zip(*points, strict=True), dashes, label=name, color=colour, marker=marker, markersize=4)
        axes.set(xscale=panel.x_scale, yscale=panel.y_scale, xlabel=panel.x_label, ylabel=panel.y_label)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    write_whole(path, lambda file: figure.savefig(file, dpi=150))
    plt.close(figure)


def _draw_bars(axes: Any, panel: Bars) -> None:
    height: dict[str, float] = {}
    for part, values in panel.parts.items():
        axes.bar(list(values), list(values.values()), 0.6, [height.get(name, 0.0) for name in values], label=part)
        height = {name: height.get(name, 0.0) + value for name, value in values.items()}
    for number, total in enumerate(height.values()):
        axes.text(number, total, f"{total:.3g}", ha="center", va="bottom")
    axes.set(ylabel=panel.y_label, ylim=(0, 1.1 * max(height.values())))
    if len(panel.parts) > 1:
        axes.legend(fontsize=8)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Create `path` with what `write` puts into a file, or leave what was there: never a half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(report: Any, path: Path) -> None:
    write_whole(path, lambda file: file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8"))


def conclude(report: Mapping[str, Any], text: str, options: argparse.Namespace) -> None:
    """Print a report as text; write it, with settings and provenance, to the file `options.json`, if there is one."""
    print(text)
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "png")}
        write_json({**report, "settings": settings, **provenance()}, options.json)
