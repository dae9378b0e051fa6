"""Pictures, drawn from the rows of a report only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = {"vanilla": "#555555", "lora": "#d98c21", "subquad": "#1f6fb4"}


def plots_available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def plot_loss_against_time(report: Mapping[str, Any], path: Path, title: str = "") -> None:
    """Dense held-out loss, or training loss where there was no evaluation, against training seconds; a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, method in report["methods"].items():
        seconds, losses, evaluated = _curve(method)
        label = f"{name} ({method['step_seconds_median']:.3g} s a step)"
        axes.plot(seconds, losses, label=label, color=COLOURS[name], marker="o" if evaluated else None, markersize=3)
    vanilla = report["methods"].get("vanilla")
    if vanilla and vanilla["eval_loss_dense"] is not None:
        axes.axhline(vanilla["eval_loss_dense"], color=COLOURS["vanilla"], linewidth=0.8, linestyle=":")
    axes.set_xlabel("training time (s), evaluations excluded")
    axes.set_ylabel("held-out loss, dense (nats per token)" if evaluated else "training loss (nats per token)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _curve(method: Mapping[str, Any]) -> tuple[list[float], list[float], bool]:
    """Seconds, losses, and whether they are held-out ones."""
    if method["evaluations"]:
        rows = method["evaluations"]
        return [row["seconds"] for row in rows], [row["eval_loss"] for row in rows], True
    seconds, passed = [], method["setup_seconds"]
    for row in method["steps"]:
        passed += row["seconds"]
        seconds.append(passed)
    return seconds, [row["train_loss"] for row in method["steps"]], False
