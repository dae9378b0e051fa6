"""Do the scripts about wide nets run, agree with their definitions, and report all that they promise?"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("peft")  # of comparison/

from studies import fired_sets, scaling, wide_net_methods
from studies.fired_sets import STRUCTURES, MarginBuckets
from studies.scaling import fitted_slope, measured_slope
from studies.wide_nets import TASKS, DenseGaussNewton, SparseGaussNewton, smooth_task

from hf_subquad.theory import GaussNewton, WideNet


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("scaling")
    arguments = ["--min-width", "128", "--max-width", "256", "--samples", "6", "--rounds", "2", "--repeats", "2"]
    arguments += ["--threads", "1", "--tokens", "64", "--layer-rounds", "1", "--json", str(folder / "s.json")]
    scaling.main([*arguments, "--png", str(folder / "s.png")])
    assert (folder / "s.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "s.json").read_text())


def test_report_has_slopes_speedup_and_where_it_was_made(report: dict[str, Any]) -> None:
    for part in (report, report["layer"]):
        for key in ("slope_subquad", "slope_dense", "speedup_at_max_width"):
            assert math.isfinite(part[key])
    assert {"definitions", "settings", "versions", "commit", "machine", "command", "finished"} <= report.keys()
    total = report["slopes"]["subquad"]["total"]
    assert total["slope"] == report["slope_subquad"] and total["widths"] == [128, 256]
    assert total["bootstrap_95"][0] <= total["bootstrap_95"][1]


def test_rows_add_up_and_sets_are_sparse(report: dict[str, Any]) -> None:
    assert len(report["rows"]) == 2 * 3
    for row in report["rows"]:
        parts = [row["seconds"][part] for part in ("forward", "solve", "update", "maintenance")]
        assert row["seconds"]["total"] == pytest.approx([sum(values) for values in zip(*parts, strict=True)])
        assert len(parts[0]) == 2
        assert 0 < row["fired_share"] <= row["fired_share_limit"] == row["width"] ** -0.2
    for width in (128, 256):
        ours, *twins = (row["losses"][:2] for row in report["rows"] if row["width"] == width)
        assert all(twin == pytest.approx(ours, rel=1e-3) for twin in twins)


def test_multiply_adds_are_those_of_the_products() -> None:
    n, m = 5, 64
    x, y = smooth_task(n)
    network = WideNet(x.shape[1], m)
    counted = {
        name: scaling.multiply_adds(name, kind(network, x, y))["update"] for name, kind in scaling.METHODS.items()
    }
    state = GaussNewton(network, x, y).state
    pairs = sum(int((h != 0).sum() * f.sum()) for h, f in zip(state.features, state.fired, strict=True))
    assert counted == {"subquad": n * n * m, "dense": n * m * m, "sparse": pairs}


@pytest.mark.parametrize("kind", [DenseGaussNewton, SparseGaussNewton])
def test_twins_take_the_same_steps(kind: type[GaussNewton]) -> None:
    x, y = (values.double() for values in smooth_task(8))
    network = WideNet(x.shape[1], 128, dtype=torch.float64)
    ours, twin = GaussNewton(network, x, y), kind(network, x, y)
    before = network.trained.weight.clone()
    for _ in range(4):
        assert twin.step().loss == pytest.approx(ours.step().loss, rel=1e-6)
        torch.testing.assert_close(twin.weight, network.trained.rows(torch.arange(128)))
    assert torch.equal(network.trained.weight, before) and not torch.equal(twin.weight, before)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("size", [0.01, 1.0])
def test_structures_report_the_same_fired_sets(name: str, size: float) -> None:
    draw = torch.Generator().manual_seed(0)
    n, m = 5, 37  # no power of two
    pre, kernel = (torch.randn(n, width, generator=draw, dtype=torch.float64) for width in (m, n))
    thresholds = torch.rand(n, 1, generator=draw, dtype=torch.float64)
    structure = STRUCTURES[name](pre, thresholds, kernel)
    start = pre > thresholds
    for _ in range(40):
        direction = size * torch.randn(n, m, generator=draw, dtype=torch.float64)
        direction *= torch.rand(n, m, generator=draw) < 0.2
        pre = pre - kernel @ direction
        assert torch.equal(structure.move(direction), pre > thresholds)
    assert not torch.equal(pre > thresholds, start)


def test_buckets_compute_less_than_everything_when_little_moves() -> None:
    draw = torch.Generator().manual_seed(0)
    pre, kernel = torch.randn(4, 1000, generator=draw), torch.eye(4)
    buckets = MarginBuckets(pre, torch.full((4, 1), 1.5), kernel)
    buckets.move(torch.full((4, 1000), 1e-3))
    assert 0 < buckets.multiply_adds < 0.1 * 4 * 4 * 1000


def test_slopes_are_exponents_and_intervals_hold_them() -> None:
    assert fitted_slope({10: 3.0, 100: 300.0}) == (pytest.approx(2.0), None)
    slope, half = fitted_slope({10: 1.0, 100: 10.0, 1000: 100.0, 10000: 1100.0})
    assert slope == pytest.approx(1.0, abs=0.05) and slope - half < 1 < slope + half
    found = measured_slope({width: [width**1.5 * noise for noise in (0.9, 1.0, 1.1)] for width in (10, 40, 90)})
    assert found["slope"] == pytest.approx(1.5)
    assert found["bootstrap_95"][0] < 1.5 < found["bootstrap_95"][1]
    assert found["line_95"] == pytest.approx([1.5, 1.5])


def test_widths_are_those_asked_for() -> None:
    assert scaling.widths_between(1024, 16384) == [1024, 2048, 4096, 5792, 8192, 11584, 16384]
    assert scaling.widths_between(1024, 3000) == [1024, 2048, 3000] and scaling.widths_between(64, 64) == [64]


def test_methods_report_paths_to_the_goal(tmp_path: Path) -> None:
    arguments = ["--width", "512", "--samples", "8", "--iterations", "12", "--threads", "1", "--adam-rates", "1e-3"]
    paths = [tmp_path / "m.json", tmp_path / "m.png"]
    wide_net_methods.main([*arguments, "--json", str(paths[0]), "--png", str(paths[1])])
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    methods = json.loads(paths[0].read_text())["methods"]
    assert len(methods) == 4 + 2 * 2 + 1
    for name, row in methods.items():
        assert len(row["losses"]) == len(row["seconds"]) > 0
        if name.startswith("Gauss"):
            assert row["iterations_to_goal"] < 8 and row["least_fall"] >= 2
        assert bool(row["used"]) == ("tensor" in name)
    for rate in ("1", "1.9"):
        both = [methods[f"gradient descent, {how}, {rate}"]["losses"] for how in ("maintained", "dense")]
        assert both[0][:5] == pytest.approx(both[1][:5], rel=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_standardised_and_repeatable(task: str) -> None:
    x, y = TASKS[task](20)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(20))
    assert (y.mean().item(), y.std().item()) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))
    assert torch.equal(TASKS[task](20)[1], y)


def test_structures_are_compared_on_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--widths", "64,128", "--samples", "6", "--iterations", "2", "--rounds", "1", "--threads", "1"]
    fired_sets.main([*arguments, "--json", str(tmp_path / "f.json")])
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [(row["width"], row["iteration"]) for row in rows] == [(64, 1), (64, 2), (128, 1), (128, 2)]
    assert all(row["multiply_adds"]["one pass"] == 36 * row["width"] for row in rows)
    assert "max trees" in capsys.readouterr().out
