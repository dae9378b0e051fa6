"""Section `correctness`: the tests of kernels, backends and graphs that need a device, as pytest counts them."""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .bench import Bench, Case, Row

_ROOT = Path(__file__).resolve().parents[2]
_FILES = ("test_triton_selection.py", "test_triton_products.py", "test_backends.py")
_TINY = {"test_triton_selection.py": "one_tile", "test_triton_products.py": "one_of_two_biases"}  # in the interpreter


def cases(bench: Bench) -> list[Case]:
    return [(name, partial(_tests, bench, name)) for name in (_TINY if bench.tiny else _FILES)]


def _tests(bench: Bench, name: str) -> Iterator[Row]:
    """A row for each test that did not pass, and one for all that did."""
    selected = ["-k", _TINY[name]] if bench.tiny else ["-m", "gpu"]
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider", *selected]
    done = subprocess.run([*command, str(_ROOT / "tests" / name)], cwd=_ROOT, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if failed := re.match(r"(?:FAILED|ERROR) \S+::(.*)", line):
            yield {"check": failed[1], "file": name, "passed": False}
    passed = re.search(r"(\d+) passed", done.stdout)
    if not passed and done.returncode not in (0, 1):
        raise RuntimeError(f"pytest did not run (pip install pytest): {(done.stdout + done.stderr)[-2000:]}")
    yield {"check": f"{passed[1] if passed else 0} tests", "file": name, "passed": done.returncode == 0}
