"""The comparison with the plain Trainer and LoRA, the demo model, and the processes that the timing rests on."""

import hashlib
import io
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

import compare_vanilla as script
import comparison.report as reports
import reporting
from apart_workers import die, double
from comparison.apart import WorkerError, run_apart
from comparison.mlp_time import MlpTimer
from comparison.random_rows import GSM8K, random_rows
from comparison.settings import RunSettings, Shape
from comparison.timed_trainer import TimedTrainer
from helpers.models import tokens
from helpers.training import Watch, patched_opt
from transformers import default_data_collator

from hf_subquad import SubquadCallback
from hf_subquad.head.patch_head import labelled_forward

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = REPOSITORY / "scripts"
DEMO_MODEL = SCRIPTS / "demo_model"
METHODS = ("vanilla", "lora", "subquad")
TEXT = "the quick brown fox jumps over the lazy dog while {} people watch it from a distance of {} metres\n"


def compare_vanilla(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "compare_vanilla.py"), "--threads", "1", *arguments],
        capture_output=True,
        text=True,
        check=check,
        timeout=600,
    )


# The whole comparison, on random weights


@pytest.fixture(scope="module")
def shape_run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    path = tmp_path_factory.mktemp("shape") / "new folder" / "run.json"
    arguments = ["--threads", "1", "--shape", "hidden=32,intermediate=128,layers=2,vocab=64,arch=opt", "--steps", "7"]
    arguments += ["--batch-size", "2", "--seq-length", "32", "--rounds", "1", "--turn-steps", "2"]
    arguments += ["--untimed-steps", "1", "--profile-steps", "1"]
    arguments += ["--rank", "4", "--set", "sketch_rank=8", "tile_size=16", "active=0.25", "--json", str(path)]
    with redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["compare_vanilla.py", *arguments])
        assert script.main() == 0
    return SimpleNamespace(path=path, report=json.loads(path.read_text()), stdout=printed.getvalue())


def test_report_has_every_key(shape_run: SimpleNamespace) -> None:
    report = shape_run.report
    assert set(report["methods"]) == set(METHODS)
    for method in report["methods"].values():
        for key in ("step_seconds_median", "tokens_per_second", "peak_memory_bytes"):
            assert method[key] > 0
        for key in ("eval_loss_dense", "eval_loss_sparse", "seconds_to_vanilla_loss"):
            assert method[key] is None  # random tokens have no held-out loss
    for key in ("speedup_vs_vanilla", "speedup_vs_lora"):
        assert report[key] > 0
        assert report[key + "_spread"]["count"] == 1
        assert report["mlp_" + key] > 0
    assert {"python", "torch", "transformers", "accelerate", "peft", "faiss", "hf_subquad"} <= set(report["versions"])
    assert report["machine"]["cpu"] and report["machine"]["cores"] >= 1 and report["machine"]["memory_bytes"] > 0
    assert "commit" in report and "compare_vanilla.py" in report["command"]
    assert report["settings"]["rank"] == 4 and report["settings"]["subquad"]["tile_size"] == 16


def test_timing_reads_nothing_that_a_method_would_have_to_compute_for_it(tmp_path: Path) -> None:
    """The head is limited to labelled positions, as in the plain Trainer."""
    rows = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens(0, (4, 7))]
    limited: list[bool] = []
    watch = Watch(lambda model, step, **_: limited.append(labelled_forward(model) is not None))
    settings = RunSettings(method="subquad", learning_rate=1e-3, steps=2, batch_size=2)
    callbacks = [SubquadCallback(), watch]
    trainer = TimedTrainer(patched_opt(), settings, rows, default_data_collator, callbacks, str(tmp_path))
    trainer.train()
    assert limited == [True, True]
    assert all(math.isfinite(row["train_loss"]) for row in trainer.steps)


def test_report_follows_from_its_own_rows(shape_run: SimpleNamespace) -> None:
    report = shape_run.report
    medians = {}
    for name, method in report["methods"].items():
        medians[name] = median(row["seconds"] for turn in method["turns"] for row in turn["steps"])
        assert method["step_seconds_median"] == medians[name]
        assert [[row["step"] for row in turn["steps"]] for turn in method["turns"]] == [[2, 3]]
        assert [row["tokens"] for row in method["steps"]] == [64] * 7
        assert method["training_seconds"] == pytest.approx(method["setup_seconds"] + 7 * medians[name])
        assert method["steps"][-1]["training_seconds"] == method["training_seconds"]
        assert all(math.isfinite(row["train_loss"]) for row in method["steps"])
        # A turn trains on the first batches of the whole training, from the same weights.
        for turn in method["turns"]:
            losses = [row["train_loss"] for row in turn["steps"]]
            assert losses == pytest.approx([row["train_loss"] for row in method["steps"][1:3]], rel=1e-4)
    assert report["speedup_vs_vanilla"] == medians["vanilla"] / medians["subquad"]
    assert report["speedup_vs_lora"] == medians["lora"] / medians["subquad"]


def test_only_what_is_patched_counts_towards_the_limit(shape_run: SimpleNamespace) -> None:
    report = shape_run.report
    assert all(mlp["neurons"] == 128 for mlp in report["patched"])
    assert report["predicted_share"] == report["context_share"] == 0.25
    for baseline in ("vanilla", "lora"):
        share = report["methods"][baseline]["mlp_share_of_step"]
        assert 0 < share < 0.9
        assert report[f"amdahl_limit_vs_{baseline}"] == pytest.approx(1 / (1 - share))


def test_methods_start_equal_and_train_what_they_should(shape_run: SimpleNamespace) -> None:
    methods = shape_run.report["methods"]
    first = [methods[name]["steps"][0]["train_loss"] for name in METHODS]
    assert first[0] == pytest.approx(first[1], abs=1e-4)  # LoRA starts as the identity
    assert first[0] == pytest.approx(first[2], abs=0.05)  # and sparse is near dense
    trained = [methods[name]["trained_parameters"] for name in METHODS]
    assert trained[0] == methods["vanilla"]["total_parameters"] > max(trained[1:]) and min(trained[1:]) > 0


def test_memory_is_told_before(shape_run: SimpleNamespace) -> None:
    first = shape_run.stdout.splitlines()[0]
    assert first.startswith("memory: vanilla up to about ") and "one at a time" in first and "GB are available" in first


def test_table_and_picture(shape_run: SimpleNamespace) -> None:
    assert all(name in shape_run.stdout for name in METHODS)
    assert f"{shape_run.report['speedup_vs_lora']:.2f}x" in shape_run.stdout
    pytest.importorskip("matplotlib")
    assert shape_run.path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in shape_run.path.parent.iterdir()) == ["run.json", "run.png"]


# A model and text, from the checkpoint in the repository


@pytest.mark.slow
def test_text_run_measures_losses_and_saves_a_plain_checkpoint(tmp_path: Path) -> None:
    for name, first in (("train", 0), ("eval", 500)):
        lines = [json.dumps({"text": TEXT.format(i, i * 7)}) for i in range(first, first + 60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["--model", str(DEMO_MODEL), "--train-file", str(tmp_path / "train.jsonl")]
    arguments += ["--eval-file", str(tmp_path / "eval.jsonl"), "--max-eval-rows", "4", "--eval-every", "2"]
    arguments += ["--steps", "4", "--batch-size", "2", "--seq-length", "64", "--methods", "vanilla,subquad"]
    arguments += ["--learning-rate", "vanilla=1e-4", "subquad=1e-2", "--profile-steps", "0"]
    arguments += ["--rounds", "1", "--turn-steps", "1", "--untimed-steps", "0", "--active", "0.25"]
    arguments += ["--json", str(tmp_path / "run.json"), "--save-to", str(tmp_path / "checkpoint")]
    compare_vanilla(*arguments)
    report = json.loads((tmp_path / "run.json").read_text())
    vanilla, subquad = (report["methods"][name] for name in ("vanilla", "subquad"))
    assert report["speedup_vs_lora"] is None and report["amdahl_limit_vs_vanilla"] is None
    assert [row["step"] for row in vanilla["evaluations"]] == [0, 2, 4]
    assert vanilla["evaluations"][0]["eval_loss"] == pytest.approx(subquad["evaluations"][0]["eval_loss"], abs=1e-5)
    assert vanilla["eval_loss_sparse"] is None and math.isfinite(subquad["eval_loss_sparse"])
    assert subquad["eval_loss_sparse"] != subquad["eval_loss_dense"]
    for method in (vanilla, subquad):
        assert method["eval_loss_dense"] == method["evaluations"][-1]["eval_loss"]
        assert method["eval_loss_dense"] < method["evaluations"][0]["eval_loss"]
    assert vanilla["seconds_to_vanilla_loss"] == pytest.approx(vanilla["training_seconds"])

    from demo import check_checkpoint

    run = SimpleNamespace(eval_file=str(tmp_path / "eval.jsonl"), seq_length=64, batch_size=2)
    run.max_eval_rows, run.threads = 4, 1
    checked = check_checkpoint(tmp_path / "checkpoint", run)  # type: ignore[arg-type]
    assert checked["eval_loss"] == pytest.approx(subquad["eval_loss_dense"], abs=1e-4)
    assert checked["text"]


def test_demo_model_is_small_trained_and_described() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    size = sum(path.stat().st_size for path in DEMO_MODEL.iterdir())
    assert (DEMO_MODEL / "model.safetensors").stat().st_size <= 16e6 and size <= 17e6
    card = (DEMO_MODEL / "README.md").read_text(encoding="utf-8")
    assert all(word in card for word in ("held-out loss", "PSF", "tokens", "Limits", "seed"))
    assert hashlib.sha256((DEMO_MODEL / "model.safetensors").read_bytes()).hexdigest() in card
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    text = Path(json.__file__).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :512]
    assert tokenizer.decode(ids[0]) == text[: len(tokenizer.decode(ids[0]))]
    loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 0.6 * math.log(model.config.vocab_size)


def test_language_reference_is_split_without_overlap() -> None:
    from demo import language_reference_text

    train, held_out = (
        {paragraph for text in part for paragraph in text.split("\n\n")} for part in language_reference_text()
    )
    assert len(train) > 500 and len(held_out) > 100
    assert not train & held_out


# Wrong input


@pytest.mark.slow
def test_failing_method_is_reported_with_its_traceback() -> None:
    done = compare_vanilla(
        "--shape", "hidden=32,intermediate=128,layers=2,vocab=64", "--methods", "subquad", "--steps", "4",
        "--active", "9999", check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "subquad failed" in done.stderr and "Traceback" in done.stderr and "9999" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "hidden=32"], "missing intermediate, layers, vocab"),
        (["--shape", "hidden=32,intermediate=128,layers=2,vocab=64,arch=gpt"], "arch must be"),
        (["--shape", "hidden=32,intermediate=128,layers=2,vocab=64,padding=0.6"], "no rows have shares padding=0.6"),
        (["--model", "somewhere"], "needs --train-file and --eval-file"),
        (["--shape", "hidden=8,intermediate=8,layers=1,vocab=8", "--rounds", "0"], "--rounds must be at least 1"),
        (["--shape", "hidden=8,intermediate=8,layers=1,vocab=8", "--methods", "lora,adam"], "expected some of"),
        (["--shape", "hidden=8,intermediate=8,layers=1,vocab=8", "--gradient-checkpointing"], "--profile-steps 0"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.parse_options(arguments)
    assert message in capsys.readouterr().err


def test_shape_parses() -> None:
    text = "hidden=2048, intermediate=8192,layers=4,vocab=100,arch=llama"
    assert Shape.parse(text) == Shape(2048, 8192, 4, 100, "llama")
    assert Shape.parse(text + ",padding=0.3,kv_heads=8") == Shape(2048, 8192, 4, 100, "llama", padding=0.3, kv_heads=8)


@pytest.mark.parametrize(("padding", "context"), [GSM8K, (0.0, 0.5), (0.0, 0.0)])
def test_random_rows_have_the_classes_of_tokens(padding: float, context: float) -> None:
    rows = random_rows(1000, 100, 50, padding, context, seed=1)
    ids, real, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask", "labels"))
    labelled = labels != -100
    assert torch.equal(labels[labelled], ids[labelled]) and not (labelled & (real == 0)).any()
    assert real.diff(dim=1).max() <= 0 and real[:, 0].all()  # padded on the right
    assert 1 - real.float().mean() == pytest.approx(padding, abs=0.01)
    assert (real - labelled.long()).float().mean() == pytest.approx(context, abs=0.01)
    again = random_rows(1000, 100, 50, padding, context, seed=1)
    assert all(torch.equal(one[name], other[name]) for one, other in zip(rows, again, strict=True) for name in one)


# Processes


def test_work_is_done_in_another_process_and_reported_in_order() -> None:
    told: list[int] = []
    pid, result = run_apart("one", double, 21, told.append)
    assert result == 42 and told == [0, 1, 2] and pid != os.getpid()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("killed", r"SIGKILL; it had held (0\.[3-9]|[1-9][0-9.]*) GB of memory, of the machine's .* no memory left"),
        ("exits", "exit status 3"),
        ("raises", "EOFError: a truncated file"),
    ],
)
def test_a_dying_process_is_named(how: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError, match=f"(?s)lora, round 2.*{message}"):
        run_apart("lora, round 2", die, how)
    assert time.monotonic() - start < 30
    assert not multiprocessing.active_children()


def test_a_killed_comparison_leaves_no_process_behind(tmp_path: Path) -> None:
    here = f"import sys; sys.path[:0] = {sys.path!r}; from apart_workers import sleep"
    code = f"{here}; from comparison.apart import run_apart; run_apart('one', sleep, {str(tmp_path)!r})"
    parent = subprocess.Popen([sys.executable, "-c", code])
    began, pid = time.monotonic(), tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):
        assert parent.poll() is None and time.monotonic() - began < 60
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(int(pid.read_text())).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() - began < 90
            time.sleep(0.1)


# Parts


def run(losses: list[float], **more: Any) -> dict[str, Any]:
    """What a full training returns: six steps, evaluations before, halfway and after."""
    steps = [{"step": i + 1, "seconds": 1.0, "tokens": 100, "train_loss": 1.0} for i in range(6)]
    return {
        "steps": steps,
        "evaluations": [{"step": step, "eval_loss": loss} for step, loss in zip((0, 3, 6), losses, strict=True)],
        "setup_seconds": 0.5,
        "logs": [],
        "digest": "same",
        "peak_memory_bytes": 10,
        "memory_before_model_bytes": 5,
        "trained_parameters": 1,
        "total_parameters": 2,
        "eval_loss_dense": losses[-1],
        "eval_loss_sparse": None,
        "patched": [],
    } | more


def turns(*rounds: list[float], mlp: float = 0.0, digest: str = "same") -> list[dict[str, Any]]:
    """What the turns of a method return, from the seconds of their steps."""
    return [
        {
            "steps": [{"seconds": s, "tokens": 100} for s in seconds],
            "profile": [{"seconds": seconds[0], "mlp_seconds": mlp}],
            "digest": digest,
        }
        for seconds in rounds
    ]


def test_summary_of_known_times() -> None:
    patched = [{"name": "mlp", "neurons": 100, "predicted": 100, "context": 25, "gradient": 0.99}]
    runs = {"vanilla": run([3.0, 2.5, 2.0]), "subquad": run([3.0, 2.0, 1.5], patched=patched, eval_loss_sparse=1.6)}
    timed = {"vanilla": turns([4, 4], [5, 5], mlp=2.0), "subquad": turns([2, 2], [1, 1], mlp=0.5)}
    summary = reports.summarise(runs, timed)
    assert summary["speedup_vs_vanilla"] == 4.5 / 1.5
    spread = summary["speedup_vs_vanilla_spread"]
    assert (spread["min"], spread["max"], spread["count"]) == (2, 5, 2)
    share = (2 / 4 + 2 / 5) / 2
    assert summary["methods"]["vanilla"]["mlp_share_of_step"] == pytest.approx(share)
    assert summary["amdahl_limit_vs_vanilla"] == pytest.approx(1 / (1 - share))
    assert summary["mlp_speedup_vs_vanilla"] == 4
    assert summary["speedup_vs_lora"] is summary["mlp_speedup_vs_lora"] is None
    assert summary["methods"]["vanilla"]["seconds_to_vanilla_loss"] == 0.5 + 6 * 4.5
    assert summary["methods"]["subquad"]["seconds_to_vanilla_loss"] == 0.5 + 3 * 1.5  # it was there halfway
    text = reports.table(summary)
    assert "3.00x" in text and "4.00x" in text and "1.6000" in text and "25.0% for context tokens" in text
    assert summary["predicted_share"] == 1 and summary["context_share"] == 0.25


def test_summary_refuses_other_data() -> None:
    runs = {"vanilla": run([1, 1, 1]), "lora": run([1, 1, 1], digest="other")}
    with pytest.raises(ValueError, match="other data"):
        reports.summarise(runs, {"vanilla": turns([1]), "lora": turns([1])})
    runs["lora"]["digest"] = "same"
    with pytest.raises(ValueError, match="other data"):
        reports.summarise(runs, {"vanilla": turns([1]), "lora": turns([1], digest="other")})


def test_loss_never_reached_is_null_and_said() -> None:
    runs = {"vanilla": run([3, 2, 1]), "lora": run([3, 2, 1.5])}
    summary = reports.summarise(runs, {"vanilla": turns([1]), "lora": turns([1])})
    assert summary["methods"]["lora"]["seconds_to_vanilla_loss"] is None
    assert "not reached" in reports.table(summary)


def test_picture_of_losses(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    summary = reports.summarise({"vanilla": run([3, 2, 1])}, {"vanilla": turns([1])})
    reports.write_plot(summary, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 5000


def test_files_are_never_half_written(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(file: Path) -> None:
        file.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        reporting.write_whole(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.03)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return gradient


class TwoProjections(torch.nn.Module):
    """An MLP without a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.fc1, self.fc2 = (torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Slow.apply(self.fc2(Slow.apply(self.fc1(Slow.apply(self.before(x))))))


class Gated(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (torch.nn.Linear(4, 4) for _ in range(3))
        self.inputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for projection in (self.gate, self.up):
            projection.register_forward_pre_hook(lambda _, inputs: self.inputs.append(inputs[0]))
        return self.down(Slow.apply(self.gate(x)) * self.up(x))


class OneModule(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.mlp = torch.nn.Linear(4, 4), Gated()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Slow.apply(self.mlp(Slow.apply(self.before(x))))


@pytest.mark.parametrize(
    ("model", "mlps"),
    [(TwoProjections, {"": ["fc1", "fc2"]}), (OneModule, {"mlp": ["mlp.gate", "mlp.up", "mlp.down"]})],
)
def test_mlp_time_is_what_lies_between_its_ends(model: Any, mlps: dict[str, list[str]]) -> None:
    model = model()
    timer = MlpTimer(model, mlps, time.perf_counter)
    model(torch.ones(2, 4)).sum().backward()
    assert 0.08 <= timer.seconds < 0.15  # only the sleeper in between, of three
    if isinstance(model, OneModule):
        assert model.mlp.inputs[0] is model.mlp.inputs[1]  # patched projections know by it that they belong together
    timer.restart()
    assert timer.seconds == 0
