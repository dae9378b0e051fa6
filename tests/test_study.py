"""The study of selections: each method selects what it says, times are spent as asked, and reports are whole."""

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM
from transformers.utils import logging

pytest.importorskip("peft")
pytest.importorskip("datasets")
pytest.importorskip("yaml")
pytest.importorskip("matplotlib")

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
DEMO_MODEL = SCRIPTS / "demo_model"
sys.path.insert(0, str(SCRIPTS))

import study_selection  # noqa: E402
from study.report import at_equal_x  # noqa: E402
from study.selections import FixedSet, Method, WholeSequences, equal_runs, install, token_importance  # noqa: E402
from study.spending import allocated, predicted_ms, threshold, uniform  # noqa: E402

from hf_subquad import SubquadConfig, patch_model, sparse_forward, sparse_mlps  # noqa: E402
from hf_subquad.planning.calibration import MeasuredMLP  # noqa: E402
from hf_subquad.planning.mlp_timing import MLPTiming  # noqa: E402

BATCH, LENGTH, NEURONS = 3, 16, 64  # no power of two: tiles of the library would not be sequences
METHODS = ("dense", "fixed", "sequence", "consecutive-8", "similar-8", "similar-8", "similar-8+compensation+plan")


@pytest.fixture(scope="module", autouse=True)
def _verbosity() -> Iterator[None]:
    before = logging.get_verbosity()  # which the script lowers
    yield
    logging.set_verbosity(before)


def tiny_opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=4096, hidden_size=32, ffn_dim=NEURONS, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0, init_std=0.3,
    )  # fmt: skip
    return OPTForCausalLM(config)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Command line for a tiny random model on a little text."""
    folder = tmp_path_factory.mktemp("study")
    tiny_opt().save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, folder / "model" / name)
    text = "".join(f"def f{i}(x, y={i}):\n    return x * {i} + y ** {i % 7}\n" for i in range(120))
    (folder / "text.txt").write_text(text)
    files = ["--model", str(folder / "model"), "--train-file", str(folder / "text.txt")]
    files += ["--eval-file", str(folder / "text.txt"), "--max-eval-rows", "6"]
    return [*files, "--batch-size", str(BATCH), "--seq-length", str(LENGTH), "--rank", "2", "--threads", "1"]


def run(arguments: list[str], study: str, path: Path, *more: str) -> dict[str, Any]:
    assert study_selection.main([study, *arguments, *more, "--json", str(path)]) == 0
    return json.loads(path.read_text())


# The whole studies


@pytest.fixture(scope="module")
def granularity(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("granularity")
    more = ["--methods", *METHODS, "--shares", "0.25", "0.5", "--steps", "2", "--turn-steps", "1"]
    report = run(arguments, "granularity", folder / "rows.json", *more, "--png", str(folder / "rows.png"))
    assert (folder / "rows.png").read_bytes().startswith(b"\x89PNG")
    return report


def test_granularity_has_a_row_for_every_method_and_share(granularity: dict[str, Any]) -> None:
    asked = [(row["method"], row["asked"]) for row in granularity["rows"]]
    assert asked == [("dense", 1.0), *((name, share) for name in METHODS[1:] for share in (0.25, 0.5))]
    assert granularity["dense_loss"] > 0
    assert {"versions", "commit", "machine", "command", "settings", "definitions"} <= set(granularity)
    for row in granularity["rows"]:
        keys = ("loss_increase", "kl", "mlp_ms", "step_seconds", "held_out_loss_dense", "held_out_loss_sparse")
        assert all(math.isfinite(row[key]) for key in keys)
        assert row["mlp_ms"] > 0 and row["step_seconds"] > 0
        assert [step["step"] for step in row["steps"]] == [1, 2]
        if "plan" not in row["method"]:
            assert row["active"] == [round(row["asked"] * NEURONS)] * 2


def test_methods_select_what_they_say(granularity: dict[str, Any]) -> None:
    tokens = BATCH * LENGTH
    tiles = {
        (row["method"], tuple(map(tuple, row["tiles"]))) for row in granularity["rows"] if None not in row["tiles"]
    }
    assert ("fixed", ((1, tokens),) * 2) in tiles
    assert all(row["distinct"] == [1, 1] for row in granularity["rows"] if row["method"] == "fixed")
    assert ("sequence", ((BATCH, LENGTH),) * 2) in tiles
    assert ("consecutive-8", ((8, 6),) * 2) in tiles and ("similar-8", ((8, 6),) * 2) in tiles
    assert {row["method"] for row in granularity["rows"] if None in row["tiles"]} <= {"dense", METHODS[-1]}


def test_dense_is_dense(granularity: dict[str, Any]) -> None:
    dense = granularity["rows"][0]
    assert dense["loss_increase"] == 0 and dense["kl"] == pytest.approx(0, abs=1e-6)
    assert dense["held_out_loss_dense"] == dense["held_out_loss_sparse"]


def test_runs_have_the_same_start_and_batches_and_leave_each_other_alone(granularity: dict[str, Any]) -> None:
    """A method that is given twice trains twice, with runs of other methods in between."""
    rows = [row for row in granularity["rows"] if row["method"] == "similar-8" and row["asked"] == 0.25]
    first, second = ([step["train_loss"] for step in row["steps"]] for row in rows)
    assert first == second and rows[0]["held_out_loss_sparse"] == rows[1]["held_out_loss_sparse"]


def test_granularity_at_target_times(arguments: list[str], tmp_path: Path) -> None:
    more = ["--methods", "fixed", "similar-8", "--times", "0.5"]
    rows = run(arguments, "granularity", tmp_path / "rows.json", *more)["rows"]
    assert [(row["method"], row["asked"]) for row in rows] == [("fixed", 0.5), ("similar-8", 0.5)]
    assert all(row["predicted_ms"] > 0 for row in rows) and "step_seconds" not in rows[0]


def test_allocation_has_a_row_for_every_way_and_time(arguments: list[str], tmp_path: Path) -> None:
    more = ["--times", "1.5", "0.5", "--tile-size", "8"]
    report = run(arguments, "allocation", tmp_path / "rows.json", *more)
    found = {(row["way"], row["target"]) for row in report["rows"]}
    ways = ("uniform", "threshold", "allocated")
    assert found == {(way, target) for way in ways for target in (1.5, 0.5)}
    for row in report["rows"]:
        assert all(math.isfinite(row[key]) for key in ("predicted_sum", "predicted_kl", "loss_increase", "kl"))
        assert row["reached"] == (row["predicted_time"] <= row["target"])
        assert len(row["active"]) == 2
    assert len(report["mlps"]) == 2 and all(mlp["errors"] for mlp in report["mlps"])


# Selections


@pytest.fixture
def mlp() -> Any:
    return sparse_mlps(patch_model(tiny_opt(), SubquadConfig(rank=2, sketch_rank=16)))[0]


def test_fixed_set_is_the_same_for_any_tokens(mlp: Any) -> None:
    importance = torch.rand(NEURONS)
    select = FixedSet(importance)
    for tokens in (BATCH * LENGTH, 7):
        selection = select(torch.randn(tokens, 32), 10, 8, "similar")
        assert selection.tiles.shape == (1, tokens)
        assert set(selection.neurons[0].tolist()) == set(importance.topk(10).indices.tolist())


def test_whole_sequences_choose_for_each_sequence_alone(mlp: Any) -> None:
    select = WholeSequences(mlp.index, BATCH)
    x = torch.randn(BATCH * LENGTH, 32)
    selection = select(x, 10, 8, "similar")
    assert selection.tiles.slots.tolist() == torch.arange(BATCH * LENGTH).view(BATCH, LENGTH).tolist()
    changed = x.clone()
    changed[LENGTH:] = torch.randn(2 * LENGTH, 32)
    again = select(changed, 10, 8, "similar")
    assert set(again.neurons[0].tolist()) == set(selection.neurons[0].tolist())
    assert set(again.neurons[1].tolist()) != set(selection.neurons[1].tolist())


def test_equal_runs_restore_token_order() -> None:
    tiles, values = equal_runs(12, 3, torch.device("cpu")), torch.randn(12, 5)
    assert tiles.shape == (3, 4) and torch.equal(tiles.to_tokens(tiles.to_slots(values)), values)


def test_importance_is_of_the_neurons_that_are_active() -> None:
    model = patch_model(tiny_opt(), SubquadConfig(rank=2, layers_to_transform="all"))
    mlp = sparse_mlps(model)[0]
    mlp.projections[0].bias.data.fill_(-1e3)  # ReLU: all off ...
    mlp.projections[0].bias.data[5] = 1e3  # ... but one
    batch = {"input_ids": torch.randint(4, 4096, (2, 9))}
    importance = token_importance(model, [batch])[mlp.name]
    assert importance.argmax() == 5 and importance[5] > 1000 * importance.sum().sub(importance[5])


def test_an_installed_selection_is_used_and_taken_out_again() -> None:
    model = patch_model(tiny_opt().eval(), SubquadConfig(rank=2))
    mlps = sparse_mlps(model)
    batch = {"input_ids": torch.randint(4, 4096, (2, 9))}
    seen = []

    def logits(name: str) -> torch.Tensor:
        install(model, Method.parse(name), {mlp.name: torch.rand(NEURONS) for mlp in mlps}, 2)
        handles = [m.output.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape)) for m in mlps]
        with torch.no_grad(), sparse_forward(model):
            found = model(**batch).logits
        for handle in handles:
            handle.remove()
        return found

    before = logits("similar-4")
    assert not torch.equal(logits("fixed"), before)
    assert {tuple(shape)[:2] for shape in seen[2:]} == {(1, 18)}
    assert torch.equal(logits("similar-4"), before)


@pytest.mark.parametrize(
    "name",
    ["similar", "fixed-64", "dense+compensation", "similar-8+plan", "similar-0", "consecutive-8+plan+compensation"],
)
def test_unknown_methods_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unknown method"):
        Method.parse(name)


# Spending


class Errors:
    """Output errors that fall as 1 / k, `scale` times."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def error(self, k: int) -> float:
        return self.scale / k


@pytest.fixture
def measured() -> list[MeasuredMLP]:
    """Two MLPs of equal cost, of which the second one needs its neurons more."""
    mlps = sparse_mlps(patch_model(tiny_opt(), SubquadConfig(rank=2)))
    timing = MLPTiming(full=90.0, dense=66.0, sparse={8: 10.0, 32: 34.0})
    return [
        MeasuredMLP(mlp, torch.zeros(1, 1), Errors(scale), timing, 1.0)
        for mlp, scale in zip(mlps, (1.0, 4.0), strict=True)
    ]


@pytest.mark.parametrize("ms", [110.0, 80.0, 50.0])
def test_every_way_spends_what_it_may(measured: list[MeasuredMLP], ms: float) -> None:
    mlps, timings = [one.mlp for one in measured], [one.timing for one in measured]
    spent = {
        "uniform": uniform(mlps, timings, ms),
        "threshold": threshold(measured, ms),
        "allocated": allocated(measured, ms),
    }
    for active in spent.values():
        assert 0.75 * ms < predicted_ms(active, mlps, timings) <= ms
    assert len(set(spent["uniform"])) == 1
    assert spent["threshold"][0] < spent["threshold"][1] and spent["allocated"][0] < spent["allocated"][1]

    def loss(active: list[int]) -> float:
        return sum(one.option(k).loss for one, k in zip(measured, active, strict=True))

    assert loss(spent["allocated"]) <= min(loss(spent["uniform"]), loss(spent["threshold"]))


def test_a_time_that_nothing_takes_gets_the_fastest(measured: list[MeasuredMLP]) -> None:
    mlps, timings = [one.mlp for one in measured], [one.timing for one in measured]
    assert uniform(mlps, timings, 1.0) == [4, 4]
    assert threshold(measured, 1.0) == allocated(measured, 1.0) == [8, 8]


def test_lines_are_read_off_where_all_of_them_are() -> None:
    lines = {"a": [(0.0, 0.0), (4.0, 4.0)], "b": [(2.0, 1.0), (3.0, 5.0), (9.0, 5.0)], "point": [(1.0, 1.0)]}
    assert at_equal_x(lines) == {"a": [(2.0, 2.0), (3.0, 3.0), (4.0, 4.0)], "b": [(2.0, 1.0), (3.0, 5.0), (4.0, 5.0)]}
    assert at_equal_x({"a": [(0.0, 0.0), (1.0, 1.0)], "b": [(2.0, 0.0), (3.0, 0.0)]}) == {}
