"""What study_selection.py is made of: inputs, ways to select neurons, ways to spend time, and training in turns."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "recipes"))  # which are scripts, not a package
