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

from gpu.report import markdown, problems  # noqa: E402
from gpu.settings import SHARES, Settings  # noqa: E402
from gpu.targets import step_summary, targets  # noqa: E402

CHECKED = {
    "gathered_up", "gathered_up, two matrices", "gathered_down", "gathered_down, two matrices", "update_gradients",
    "tile_scores, SiLU gated", "tile_scores, ReLU", "top_neurons", "bisect",
}  # fmt: skip


def call(folder: Path, *options: str, interpret: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int(interpret))}
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/gpu_check.py"), "--output", str(folder), *options],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def tiny(folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    done = call(folder, "--tiny", "--device", "cpu", *options)
    written = folder / "cpu-tiny.json"
    assert written.is_file(), done.stderr
    assert (folder / "cpu-tiny.md").read_text() in done.stdout and done.stdout.count("## Targets") == 2
    assert sorted(path.name for path in folder.iterdir()) == ["cpu-tiny.json", "cpu-tiny.md"]
    return done, json.loads(written.read_text())


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
    assert list(results["sections"]) == list(SHARES)
    for section in results["sections"].values():
        assert section["state"] == "done" and section["rows"] and not section["skipped"] and not section["errors"]
        assert all(case["begun"] and case["seconds"] is not None for case in section["cases"])


@pytest.mark.slow
def test_every_operation_is_checked(whole: Any) -> None:
    rows = whole[1]["sections"]["correctness"]["rows"]
    for dtype in ("fp32", "fp16"):
        assert {row["check"] for row in rows if row.get("dtype") == dtype} >= CHECKED
    for row in rows:
        assert row.get("passed") is True or "needs CUDA" in row["note"]
        assert "error" not in row or row["error"] <= row["tolerance"]
    for part in ("sync", "waits", "CUDA graph", "fullgraph", "two runs"):
        assert any(part in row["check"] or part in row["case"] for row in rows)


@pytest.mark.slow
def test_rows_of_times(whole: Any) -> None:
    sections = whole[1]["sections"]
    layers = sections["layers"]["rows"]
    assert [row["main"] for row in layers].count(True) == 1
    for row in layers:
        assert row["full_ms"] > 0 and row["lora_ms"] > 0 and row["subquad_ms"] > 0
        assert row["full_over_subquad"] == pytest.approx(row["full_ms"] / row["subquad_ms"])
        assert row["selection_share"] > 0 and row["subquad_kept_bytes"] < row["full_kept_bytes"]
    kernels = {row["kernel"]: row for row in sections["kernels"]["rows"] if row["main"]}
    for name in ("gathered_up", "gathered_up, two matrices", "gathered_down", "gathered_down, two matrices"):
        assert kernels[name]["of_dense_rate"] > 0
    for name in ("per_token", "per_neuron", "bisect", "tile_scores", "top_neurons"):
        assert kernels[name]["gb_per_second"] > 0
    assert {row["method"] for row in sections["step"]["rows"]} == {"subquad", "lora", "vanilla", "lora_same_dtype"}
    summaries = [row for row in sections["profile"]["rows"] if row["row"] == "summary"]
    assert len(summaries) == 3 and all(row["launches"] > 0 for row in summaries)
    assert any(row["heuristic"] for row in sections["sweep"]["rows"])


@pytest.mark.slow
def test_markdown(whole: Any) -> None:
    text = markdown(whole[1])
    assert all(f"\n## {name}\n" in text for name in SHARES)
    for table in text.split("\n\n"):
        lines = table.splitlines()
        if lines[0].startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in lines}) == 1, table
    assert "at least 3.5x" in text
    assert text.count("not measured") == 1  # selection in a CUDA graph


def test_a_section_that_fails_leaves_the_others(tmp_path: Path) -> None:
    done, results = tiny(
        tmp_path, "--only", "kernels,device", "--broken", "device=raise", "--broken", "kernels=exit"
    )  # fmt: skip
    assert done.returncode == 1
    raised, ended = results["sections"]["device"], results["sections"]["kernels"]
    assert raised["state"] == ended["state"] == "failed"
    assert "made to fail" in raised["errors"][0]["traceback"] and "Traceback" in raised["errors"][0]["traceback"]
    assert ended["errors"] == [{"case": "broken on purpose", "traceback": "the process ended with 3"}]
    # The rows before the failure are kept, and the cases after it are run.
    assert raised["rows"][0]["what"] == ended["rows"][0]["what"] == "a case that goes wrong on purpose"
    assert any(row.get("what") == "copy" for row in raised["rows"])
    assert any(row.get("kernel") == "top_neurons" for row in ended["rows"])
    assert results["problems"] == problems(results) and len(results["problems"]) == 2
    assert all(problem in done.stdout for problem in results["problems"])


@pytest.mark.slow
def test_a_section_that_hangs_is_stopped(tmp_path: Path) -> None:
    done, results = tiny(tmp_path, "--only", "device", "--broken", "device=hang", "--patience", "5")
    assert done.returncode == 1
    assert "sent nothing for 5 s" in results["sections"]["device"]["errors"][0]["traceback"]
    assert any(row.get("what") == "copy" for row in results["sections"]["device"]["rows"])


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    done, results = tiny(tmp_path, "--minutes", "0.0001")
    assert done.returncode == 0
    assert {section["state"] for section in results["sections"].values()} == {"skipped"}
    text = (tmp_path / "cpu-tiny.md").read_text()
    assert all(f"| {name} | skipped | 0 | 0 | all |" in text for name in SHARES)


def test_nothing_to_run_on(tmp_path: Path) -> None:
    done = call(tmp_path, "--device", "cpu")
    assert done.returncode == 2 and "--tiny" in done.stderr
    done = call(tmp_path, "--device", "cpu", "--tiny", interpret=False)
    assert done.returncode == 2 and "TRITON_INTERPRET=1" in done.stderr
    if not torch.cuda.is_available():
        done = call(tmp_path)
        assert done.returncode == 2 and "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


def test_time_that_is_left_goes_to_the_next() -> None:
    settings = Settings(Path(), tuple(SHARES))
    shares = [settings.share_until(name) for name in SHARES]
    assert shares == sorted(shares) and shares[-1] == shares[-2] == pytest.approx(1)  # the sweep gets what is left
    assert Settings(Path(), tuple(SHARES), sweep=True).share_until("profile") < 0.95
    assert Settings(Path(), ("sweep",)).share_until("sweep") == 1


def test_steps_are_compared_within_a_round() -> None:
    def turn(method: str, number: int, *ms: float) -> dict[str, Any]:
        return {"method": method, "round": number, "ms": list(ms), "peak_bytes": 10 * number}

    rows = [turn("subquad", 0, 1, 1), turn("lora", 0, 2, 2), turn("lora", 1, 6, 6), turn("subquad", 1, 2, 2)]
    summary = step_summary([*rows, turn("vanilla", 5, 7), {"method": "lora", "note": "peft is not installed"}])
    assert summary["lora"]["over_subquad"] == 2.5 and summary["lora"]["ms"] == 4 and summary["lora"]["peak_bytes"] == 10
    assert summary["vanilla"]["over_subquad"] is None
    reached = {row["target"]: row["reached"] for row in targets({"step": {"rows": rows}})}
    assert reached["Trainer step over PEFT's: lora"] is True
    assert reached["Trainer step over PEFT's: lora_same_dtype"] is None
