"""`scripts/gpu_check.py` on tiny shapes in the interpreter: what it measures, and what happens when things fail."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.3")

import gpu_check
from gpu.report import COLUMNS, markdown, problems

ROOT = Path(__file__).parents[1]


def call(folder: Path, *options: str, interpret: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int(interpret))}
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/gpu_check.py"), "--output", str(folder), *options],
        env=environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


def tiny(folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    done = call(folder, "--tiny", "--device", "cpu", *options)
    assert sorted(path.name for path in folder.iterdir()) == ["cpu-tiny.json", "cpu-tiny.md"], done.stderr
    assert done.stdout == (folder / "cpu-tiny.md").read_text() + "\n"
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
def test_rows_of_layers(whole: Any) -> None:
    rows = whole[1]["sections"]["layers"]["rows"]
    for row in rows:
        assert row["subquad_seconds"] > 0 and row["speedup_vs_lora"] > 0 and 0 <= row["selection_share"] < 1
    by_budget = {row["budget"]: row for row in rows}
    assert len(by_budget) == 8
    exact, half, none, gradient = (by_budget[name] for name in list(by_budget)[4:])
    assert 1 > exact["share"] > half["share"] > none["share"] == gradient["share"] > 0
    assert half["selection_seconds"] > 10 * none["selection_seconds"]  # which has no tiles


@pytest.mark.slow
def test_rows_of_steps(whole: Any) -> None:
    rows = whole[1]["sections"]["step"]["rows"]
    cases: dict[str, list[Any]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
        assert row["ms"] > 0 and row["peak_bytes"] > 0 and row["over_vanilla"] > 0
    assert [(of[0]["batch"], of[0]["checkpointing"]) for of in cases.values()] == [("padded", False), ("packed", True)]
    for of in cases.values():
        assert {"vanilla", "LoRA", "MLPs", "MLPs and head"} <= {row["method"] for row in of}
        assert len({row["digest"] for row in of}) == 1  # the same tokens


@pytest.mark.slow
def test_rows_of_the_profile(whole: Any) -> None:
    rows = whole[1]["sections"]["profile"]["rows"]
    timed, replayed = ([row for row in rows if key in row] for key in ("host_ms", "graph_note"))
    assert len(timed) == len(replayed) == 7 and all(row["graph_ms"] is None for row in replayed)
    for row in timed:
        assert row["ms"] >= row["host_ms"] > 0 and row["launches"] > 10
        assert row["dense_ms"] > 0 and row["device_ms"] > row["selection_ms"] >= 0


@pytest.mark.slow
def test_rows_of_kernels(whole: Any) -> None:
    kernels = {row["kernel"]: row for row in whole[1]["sections"]["kernels"]["rows"]}
    for name in ("gathered_up", "gathered_up, two matrices", "gathered_down", "gathered_down, two matrices"):
        assert kernels[name]["of_dense_rate"] > 0 and kernels[name]["pytorch_ms"] > 0
    for name in ("per_token", "per_neuron", "bisect", "tile_scores", "top_neurons"):
        assert kernels[name]["gb_per_second"] > 0


@pytest.mark.slow
def test_markdown(whole: Any) -> None:
    text = markdown(whole[1])
    assert all(f"\n## {name}\n" in text for name in COLUMNS)
    for table in text.split("\n\n"):
        lines = table.splitlines()
        if lines[0].startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in lines}) == 1, table


def broken(argument: tuple[Any, str], report: Any) -> None:
    """In place of a section."""
    report({"begin": "a case"})
    report({"row": {"what": "before it went wrong"}})
    if argument[1] == "device":
        report({"error": "Traceback\nValueError: of a case"})
    elif argument[1] == "correctness":
        os._exit(3)
    elif argument[1] == "layers":
        time.sleep(3600)
    else:
        raise RuntimeError("made to fail")


def test_sections_that_fail_leave_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "serve", broken)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    options = ["--tiny", "--device", "cpu", "--patience", "1", "--output", str(tmp_path)]
    assert gpu_check.main([*options, "--only", "step", "layers", "device", "correctness"]) == 1
    results = json.loads((tmp_path / "cpu-tiny.json").read_text())
    errors = {name: section["errors"] for name, section in results["sections"].items()}
    assert list(errors) == ["device", "correctness", "layers", "step"]  # in order of importance
    assert [len(of) for of in errors.values()] == [1, 1, 1, 1]
    for (error,), why in zip(
        errors.values(), ("of a case", "exit status 3", "sent nothing for 1 s", "made to fail"), strict=True
    ):
        assert error["case"] == "a case" and why in error["traceback"]
    for section in results["sections"].values():
        assert section["state"] == "failed" and section["rows"][0]["what"] == "before it went wrong"
    assert results["problems"] == problems(results) and len(results["problems"]) == 4
    shown = capsys.readouterr().out
    assert all(problem in shown for problem in results["problems"])


def test_a_section_has_its_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "serve", broken)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    options = ["--tiny", "--device", "cpu", "--output", str(tmp_path), "--minutes", "0.1"]
    gpu_check.main([*options, "--only", "layers", "kernels"])
    layers, kernels = json.loads((tmp_path / "cpu-tiny.json").read_text())["sections"].values()
    assert "its time was over" in layers["errors"][0]["traceback"] and 3.9 < layers["seconds"] < 6
    assert "made to fail" in kernels["errors"][0]["traceback"]


@pytest.mark.slow
def test_processes_are_spawned_as_on_a_gpu(tmp_path: Path) -> None:
    done, results = tiny(tmp_path, "--only", "device", "--start", "spawn")
    assert done.returncode == 0 and results["sections"]["device"]["rows"], done.stderr


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    done, results = tiny(tmp_path, "--minutes", "0")
    assert done.returncode == 0
    assert {section["state"] for section in results["sections"].values()} == {"skipped"}
    assert all(f"| {name} | skipped | 0 | 0 |" in (tmp_path / "cpu-tiny.md").read_text() for name in COLUMNS)


def test_nothing_to_run_on(tmp_path: Path) -> None:
    for options, interpret in ((["--device", "cpu"], True), (["--device", "cpu", "--tiny"], False)):
        done = call(tmp_path, *options, interpret=interpret)
        assert done.returncode == 2 and "--tiny" in done.stderr and "TRITON_INTERPRET=1" in done.stderr
    if not torch.cuda.is_available():
        done = call(tmp_path)
        assert done.returncode == 2 and "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())
