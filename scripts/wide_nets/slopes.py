"""Exponents: slopes of log time against log width, with confidence intervals."""

import math
import random
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

# Two-sided 95% quantiles of Student's t by degrees of freedom.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
_RESAMPLES = 2000


def fitted_slope(points: Mapping[float, float]) -> tuple[float, float | None]:
    """Least-squares slope of log y against log x, and half of its 95% interval from the residuals, of 3 points up."""
    xs, ys = [math.log(x) for x in points], [math.log(y) for y in points.values()]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread
    freedom = len(xs) - 2
    if freedom < 1:
        return slope, None
    missed = sum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in zip(xs, ys, strict=True))
    return slope, _STUDENT[min(freedom, max(_STUDENT))] * math.sqrt(missed / freedom / spread)


def measured_slope(repeats: Mapping[int, Sequence[float]], seed: int = 0) -> dict[str, Any]:
    """Slope of the medians of repeated measurements by width, with two intervals of 95%.

    `bootstrap_95` resamples the repeats of each width: how much the slope owes to noise. `line_95` is Student's, from
    the distances of the medians to the line: how well a power law fits; None for fewer than three widths.
    """
    slope, half = fitted_slope({width: median(values) for width, values in repeats.items()})
    draw = random.Random(seed)
    resampled = sorted(
        fitted_slope({width: median(draw.choices(values, k=len(values))) for width, values in repeats.items()})[0]
        for _ in range(_RESAMPLES)
    )
    return {
        "slope": slope,
        "bootstrap_95": [resampled[round(share * (_RESAMPLES - 1))] for share in (0.025, 0.975)],
        "line_95": None if half is None else [slope - half, slope + half],
        "widths": list(repeats),
    }
