"""`scripts/gpu_check.py` on tiny shapes in the interpreter: what it measures, and what happens when things fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.3")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from gpu.report import COLUMNS, markdown, problems  # noqa: E402


def call(folder: Path, *options: str, interpret: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int(interpret))}
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/gpu_check.py"), "--output", str(folder), *options],
        env=environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


def tiny(folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    done = call(folder, "--tiny", "--device", "cpu", *options)
    assert sorted(path.name for path in folder.iterdir()) == ["cpu-tiny.json", "cpu-tiny.md"], done.stderr
    assert (folder / "cpu-tiny.md").read_text() in done.stdout
    return done, json.loads((folder / "cpu-tiny.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    return tiny(tmp_path_factory.mktemp("gpu"))


@pytest.mark.slow
def test_every_section_runs(whole: Any) -> None:
    done, results = whole
    assert done.returncode == 0, done.stderr
    assert set(results) == {"device", "settings", "sections", "provenance", "seconds", "problems"}
    assert results["problems"] == []
    assert {"versions", "commit", "machine", "command", "finished"} <= set(results["provenance"])
    assert list(results["sections"]) == list(COLUMNS)
    for section in results["sections"].values():
        assert section["state"] == "done" and section["rows"] and not section["errors"]


@pytest.mark.slow
def test_tests_of_kernels_are_run_and_counted(whole: Any) -> None:
    rows = whole[1]["sections"]["correctness"]["rows"]
    assert len(rows) == 2 and all(row["passed"] and int(row["check"].split()[0]) > 0 for row in rows)


@pytest.mark.slow
def test_rows_of_times(whole: Any) -> None:
    sections = whole[1]["sections"]
    for row in sections["layers"]["rows"]:
        assert row["subquad_seconds"] > 0 and row["speedup_vs_lora"] > 0 and 0 < row["selection_share"] < 1
    kernels = {row["kernel"]: row for row in sections["kernels"]["rows"] if row["shape"] == "tiny gated"}
    for name in ("gathered_up", "gathered_up, two matrices", "gathered_down", "gathered_down, two matrices"):
        assert kernels[name]["of_dense_rate"] > 0
    for name in ("per_token", "per_neuron", "bisect", "tile_scores", "top_neurons"):
        assert kernels[name]["gb_per_second"] > 0
    assert {row["method"] for row in sections["step"]["rows"]} == {"subquad", "lora", "vanilla"}


@pytest.mark.slow
def test_markdown(whole: Any) -> None:
    text = markdown(whole[1])
    assert all(f"\n## {name}\n" in text for name in COLUMNS)
    for table in text.split("\n\n"):
        lines = table.splitlines()
        if lines[0].startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in lines}) == 1, table


def test_a_section_that_fails_leaves_the_others(tmp_path: Path) -> None:
    done, results = tiny(
        tmp_path, "--only", "kernels,device", "--broken", "device=raise", "--broken", "kernels=exit"
    )  # fmt: skip
    assert done.returncode == 1
    raised, ended = results["sections"]["device"], results["sections"]["kernels"]
    assert raised["state"] == ended["state"] == "failed"
    assert "made to fail" in raised["errors"][0]["traceback"] and "Traceback" in raised["errors"][0]["traceback"]
    assert ended["errors"] == [{"case": "broken on purpose", "traceback": "the process ended with 3"}]
    # The rows before a failure are kept, and after an exception the other cases are run.
    assert raised["rows"][0]["what"] == ended["rows"][0]["what"] == "a case that goes wrong on purpose"
    assert any(row.get("what") == "copy" for row in raised["rows"])
    assert results["problems"] == problems(results) and len(results["problems"]) == 2
    assert all(problem in done.stdout for problem in results["problems"])


@pytest.mark.slow
def test_a_section_that_hangs_is_stopped(tmp_path: Path) -> None:
    done, results = tiny(tmp_path, "--only", "device", "--broken", "device=hang", "--patience", "20")
    assert done.returncode == 1
    assert "sent nothing for 20 s" in results["sections"]["device"]["errors"][0]["traceback"]
    assert results["sections"]["device"]["rows"]


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    done, results = tiny(tmp_path, "--minutes", "0")
    assert done.returncode == 0
    assert {section["state"] for section in results["sections"].values()} == {"skipped"}
    assert all(f"| {name} | skipped | 0 | 0 |" in (tmp_path / "cpu-tiny.md").read_text() for name in COLUMNS)


def test_nothing_to_run_on(tmp_path: Path) -> None:
    done = call(tmp_path, "--device", "cpu")
    assert done.returncode == 2 and "--tiny" in done.stderr
    done = call(tmp_path, "--device", "cpu", "--tiny", interpret=False)
    assert done.returncode == 2 and "TRITON_INTERPRET=1" in done.stderr
    if not torch.cuda.is_available():
        done = call(tmp_path)
        assert done.returncode == 2 and "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())
