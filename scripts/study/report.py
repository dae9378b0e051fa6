"""Tables and pictures of the studies, made from rows only."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Points = Mapping[str, Sequence[tuple[float, float]]]  # (x, y) by the name of the line

_LEVELS = 3


class Panel(NamedTuple):
    x_label: str
    y_label: str
    lines: Points
    x_scale: str = "linear"  # or "log"
    y_scale: str = "linear"


def text_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Columns, the first aligned left, the others right."""
    cells = [list(head), *map(list, lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    )


def lines_of(rows: Iterable[Mapping[str, Any]], name: str, x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    """(row[x], row[y]) by row[name], in order of x."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row[name], []).append((row[x], row[y]))
    return {name: sorted(points) for name, points in lines.items()}


def at_equal_x(lines: Points) -> dict[str, list[tuple[float, float]]]:
    """Every line of two points or more read off at the same few x, on straight pieces between its points.

    The x lie in the range that all of these lines cover; there may be none.
    """
    drawn = {name: points for name, points in lines.items() if len(points) > 1}
    if not drawn:
        return {}
    low, high = max(points[0][0] for points in drawn.values()), min(points[-1][0] for points in drawn.values())
    if low > high:
        return {}
    levels = [low + (high - low) * step / (_LEVELS - 1) for step in range(_LEVELS)]
    return {name: [(level, _read(points, level)) for level in levels] for name, points in drawn.items()}


def _read(points: Sequence[tuple[float, float]], x: float) -> float:
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y0
    return points[-1][1]


def draw(panels: Sequence[Panel], title: str, path: Path) -> None:
    """A PNG with one panel beside the other; a line has the same colour in each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(1, len(panels), figsize=(7.5 * len(panels), 5), layout="constrained", squeeze=False)
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    styles = {name: (f"C{i % 10}", "os^vD<>ph*"[i % 10], "-" if i < 10 else "--") for i, name in enumerate(names)}
    for axes, panel in zip(grid[0], panels, strict=True):
        for name, points in panel.lines.items():
            colour, marker, dashes = styles[name]
            axes.plot(*zip(*points, strict=True), dashes, label=name, color=colour, marker=marker, markersize=5)
        axes.set_xscale(panel.x_scale)
        axes.set_yscale(panel.y_scale)
        axes.set_xlabel(panel.x_label)
        axes.set_ylabel(panel.y_label)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
