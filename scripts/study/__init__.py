"""What the studies are made of: inputs, ways to select neurons, ways to spend time, training in turns, Gauss-Newton."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "recipes"))  # which are scripts, not a package
