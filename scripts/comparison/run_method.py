"""The work of one process of a comparison. Light to import: the parent imports it too, and needs no torch."""

import os
import sys
from pathlib import Path
from typing import Any

from .run_settings import RunSettings
from .turns import Turns

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def run_method(settings: RunSettings, turns: Turns) -> dict[str, Any]:
    """Train by `settings.method` in turns; what was measured, see `measured_training.measure`."""
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)  # read when torch is loaded
    sys.path.insert(0, str(RECIPES))
    from .measured_training import measure

    return measure(settings, turns)
