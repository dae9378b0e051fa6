"""Section `correctness`: the tests of kernels, backends and graphs that need a device, by pytest in this process."""

import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .bench import Bench, Case, Report, Row

_TESTS = Path(__file__).resolve().parents[2] / "tests"
_FILES = ("test_triton_products.py", "test_triton_selection.py", "test_backends.py", "test_verification.py")
_TINY = ["-k", "one_tile or one_of_two_biases", "--assert=plain"]  # in the interpreter


def cases(bench: Bench) -> list[Case]:
    return [("pytest", partial(_tests, bench))]


class _Reporter:
    """A pytest plugin: names each test before it runs, sends those that fail, and counts the others by file."""

    def __init__(self, report: Report) -> None:
        self.report, self.passed = report, Counter[str]()

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        self.report({"begin": nodeid})

    def pytest_runtest_logreport(self, report: Any) -> None:
        file, _, test = report.nodeid.rpartition("/")[2].partition("::")
        if report.failed:
            why = report.longreprtext.strip()
            self.report({"row": {"check": test, "file": file, "passed": False, "why": why[-2000:]}})
        elif report.when == "call" and report.passed:
            self.passed[file] += 1


def _tests(bench: Bench) -> Iterator[Row]:
    import pytest

    reporter = _Reporter(bench.report)
    os.chdir(_TESTS.parent)
    # After an illegal memory access, all that follow fail, too.
    options = ["-q", "--tb=short", "--maxfail=20", "-p", "no:cacheprovider"]
    options += _TINY if bench.tiny else ["-m", "gpu"]
    code = pytest.main([*options, *(str(_TESTS / name) for name in _FILES[: 2 if bench.tiny else 4])], [reporter])
    if code not in (0, 1):
        raise RuntimeError(f"pytest did not run; its exit status is {code}")
    for file, count in reporter.passed.items():
        yield {"check": f"{count} tests", "file": file, "passed": True}
