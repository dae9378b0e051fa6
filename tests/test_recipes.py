"""The recipes: settings, and every YAML end to end on tiny random models of its architecture."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft")
pytest.importorskip("datasets")
yaml = pytest.importorskip("yaml")

import data
import finetune_classifier
import finetune_lm
import lm_data
import settings as recipe_settings
import training
from accelerate.commands.launch import launch_command, launch_command_parser
from data import DataError
from helpers.recipes import WORDS, N, lm_settings, word_tokenizer
from settings import ClassifierSettings, LmSettings, SettingsError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = REPOSITORY / "recipes"
METHODS = ("vanilla", "lora", "subquad")
NAMES = (
    "bert-base", "llama-3.2-1b", "minilm", "opt-1.3b", "relu-opt-14m", "relu-opt-wide-16m", "smollm2-135m",
    "smollm2-135m-long-prompt", "swiglu-llama-14m",
)  # fmt: skip
ARCHITECTURES = {"minilm": "bert", "smollm2": "llama"}  # where the name does not say it
CONFIGS = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "accelerate")


# Models and data, made in memory


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders opt, llama and bert: random models of three layers, hidden size 32, 96 neurons, fp32.

    Ten times the usual initial scale, so that every part of them shows in the loss."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    shape = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    position = {"max_position_embeddings": 512}
    opt = OPTConfig(ffn_dim=96, word_embed_proj_dim=32, dropout=0.0, init_std=0.2, **shape, **ends, **position)
    llama = LlamaConfig(intermediate_size=96, num_key_value_heads=2, initializer_range=0.2, **shape, **ends, **position)
    bert = BertConfig(
        intermediate_size=96, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
        initializer_range=0.2, **shape, **position,
    )  # fmt: skip
    for name, model, tokenizer in (
        ("opt", OPTForCausalLM(opt), word_tokenizer()),
        ("llama", LlamaForCausalLM(llama), word_tokenizer(bos=True)),
        ("bert", BertForMaskedLM(bert), word_tokenizer(cls=True)),
    ):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """{train,test}.jsonl with questions, answers, sentences and labels, of varied lengths."""
    root = tmp_path_factory.mktemp("data")
    generator = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(generator.choices(WORDS[:38], k=generator.randint(low, high)))

    for name, rows in (("train", 40), ("test", 8)):
        lines = [
            {"question": words(3, 20), "answer": words(2, 12), "sentence": words(4, 20), "label": row % 2}
            | {"text": words(10, 40)}
            for row in range(rows)
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def architecture(name: str) -> str:
    known = (kind for part, kind in ARCHITECTURES.items() if part in name)
    return next(known, None) or next(kind for kind in ("bert", "llama", "opt") if kind in name)


def run(config: Path, models_folder: Path, data_folder: Path, output: Path, *more: str, dry: bool = True) -> dict:
    """Run a recipe on a tiny model and tiny files instead of its own."""
    name = config.name
    script = finetune_classifier if architecture(name) == "bert" else finetune_lm
    overrides = [
        f"model={models_folder / architecture(name)}",
        "dataset=null",
        "dataset_config=null",
        f"train_file={data_folder / 'train.jsonl'}",
        f"eval_file={data_folder / 'test.jsonl'}",
        "text_column=sentence",
        f"output_dir={output}",
        "use_cpu=true",
        "bf16=false",
        "dtype=float32",
        "disable_tqdm=true",
        "learning_rate=0.01",  # and no warm-up: two steps must move the loss
        "warmup_steps=0",
        *(["answer_template=w{label}", "max_length=256"] if "long-prompt" in name else []),
        *more,
    ]
    return script.main(["--config", str(config), "--set", *overrides, *(["--dry-run"] if dry else [])])


# The YAML files


def test_every_model_has_its_three_recipes() -> None:
    assert [path.stem for path in CONFIGS] == sorted(f"{name}-{method}" for name in NAMES for method in METHODS)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_recipe_is_accepted(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # as `accelerate launch` does, given accelerate/cpu.yaml
    cls = ClassifierSettings if "classifier" in config.read_text() else LmSettings
    settings = recipe_settings.settings_from_mapping(cls, recipe_settings.read_yaml(config))
    name, _, method = config.stem.rpartition("-")
    assert settings.method == method
    assert settings.output_dir == f"out/{name}-{method}"
    arguments = training.training_arguments(settings)
    assert arguments.use_cpu and arguments.bf16 == settings.training["bf16"]
    assert arguments.optim == "adamw_torch_fused"
    assert arguments.learning_rate == settings.training["learning_rate"]


@pytest.mark.parametrize("name", NAMES)
def test_twins_differ_in_the_method_block_only(name: str) -> None:
    before, blocks, after = set(), set(), set()
    for method in METHODS:
        head, rest = (RECIPES / f"{name}-{method}.yaml").read_text().split("# >>> method")
        block, tail = rest.split("# <<< method")
        before.add(head)
        blocks.add(block)
        after.add(tail)
        assert f"--config recipes/{name}-{method}.yaml" in block
    assert (len(before), len(blocks), len(after)) == (1, 3, 1)


def test_commands_in_headers_name_files_that_exist() -> None:
    named = {
        word
        for config in CONFIGS
        for line in config.read_text().splitlines()
        if line.startswith("#")
        for word in line.split()
        if word.startswith("recipes/")
    }
    assert len(named) >= len(CONFIGS) + 3
    assert all((REPOSITORY / word).is_file() for word in named)


def test_accelerate_configs_parse() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = {path.stem: load_config_from_file(str(path)) for path in (RECIPES / "accelerate").glob("*.yaml")}
    assert set(found) == {"cpu", "single_gpu", "multi_gpu", "fsdp2"}
    assert found["cpu"].use_cpu and found["cpu"].num_processes == 1
    assert not found["single_gpu"].use_cpu
    assert found["multi_gpu"].distributed_type == "MULTI_GPU" and found["multi_gpu"].num_processes == 2
    assert found["fsdp2"].distributed_type == "FSDP" and found["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert not found["fsdp2"].fsdp_config["fsdp_cpu_ram_efficient_loading"]


# Settings


@pytest.mark.parametrize(
    "values, message",
    [
        ({"learnig_rate": 1e-3}, "did you mean learning_rate"),
        ({"tile_sizes": 64}, "did you mean tile_size"),
        ({"zzz": 1}, "unknown setting 'zzz'"),
        ({"do_train": True}, "unknown setting 'do_train'"),
        ({"training": {}}, "unknown setting 'training'"),
        ({"max_length": "long"}, "max_length must be an integer, got 'long'"),
        ({"max_length": True}, "max_length must be an integer, got True"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"method": "magic"}, "method must be 'vanilla' or 'lora' or 'subquad', got 'magic'"),
        ({"lr_scheduler_type": 3}, "lr_scheduler_type must be"),
        ({"model": None}, "model must be a text, got None"),
        ({"rank": 8}, "rank: no effect with method: vanilla"),
        ({"method": "lora", "active": 0.25}, "active: no effect with method: lora"),
        ({"dataset": "d"}, "set either dataset"),
        ({"eval_file": None}, "train_file and eval_file go together"),
        ({"prompt_template": "a"}, "prompt_template and answer_template go together"),
        ({"loss_on": "answers"}, "loss_on: answers needs prompt_template"),
        ({"chat": True}, "chat needs prompt_template"),
        ({"packing": True}, "packing needs prompt_template"),
        ({"prompt_template": "a", "answer_template": "b", "answer_accuracy": True}, "needs loss_on: answers, without"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        lm_settings(**values)


def test_missing_settings_are_named() -> None:
    with pytest.raises(SettingsError, match="missing settings: model, method, output_dir"):
        recipe_settings.settings_from_mapping(LmSettings, {"train_file": "a", "eval_file": "b"})


def test_sparse_settings_are_checked_by_the_library_and_reach_it() -> None:
    with pytest.raises(ValueError, match="tile_size must be an integer of at least 1, got 0"):
        lm_settings(method="subquad", tile_size=0)
    values = {"tile_size": 32, "rank": 4, "seed": 7, "layers_to_transform": [1], "exclude_modules": ["vision_tower"]}
    config = lm_settings(method="subquad", **values).subquad_config()
    assert {name: getattr(config, name) for name in values} == values
    assert type(config).__name__ == "SubquadConfig"


def test_yaml_numbers_overrides_and_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: m\nmethod: lora\noutput_dir: o\ntrain_file: a.txt\neval_file: b.txt\nlearning_rate: 1e-4\n")
    argv = ["--config", str(path)]
    settings = recipe_settings.parse_settings(LmSettings, argv)
    assert settings.training == {"learning_rate": 1e-4}
    settings = recipe_settings.parse_settings(
        LmSettings, [*argv, "--set", "learning_rate=3e-5", "bf16=true", "--set", "max_train_rows=5", "rank=2"]
    )
    assert settings.training == {"learning_rate": 3e-5, "bf16": True}
    assert (settings.max_train_rows, settings.rank) == (5, 2)
    with pytest.raises(SettingsError, match="key=value, got 'rank'"):
        recipe_settings.parse_settings(LmSettings, [*argv, "--set", "rank"])
    with pytest.raises(SettingsError, match="did you mean rank"):
        recipe_settings.parse_settings(LmSettings, [*argv, "--set", "rnk=3"])
    with pytest.raises(SettingsError, match=r"cannot read .*missing\.yaml"):
        recipe_settings.parse_settings(LmSettings, ["--config", str(tmp_path / "missing.yaml")])
    for text, message in (("a: 1\na: 2\n", "key given twice: a"), ("just words", "key: value"), ("a: [", "valid YAML")):
        path.write_text(text)
        with pytest.raises(SettingsError, match=message):
            recipe_settings.parse_settings(LmSettings, argv)


def test_training_arguments_pass_through(tmp_path: Path) -> None:
    settings = lm_settings(output_dir=str(tmp_path), adam_beta2=0.95, use_cpu=True, seed=3, optim="sgd")
    arguments = training.training_arguments(settings)
    assert (arguments.adam_beta2, arguments.seed, arguments.optim) == (0.95, 3, "sgd")
    assert not arguments.gradient_checkpointing
    assert training.training_arguments(lm_settings(gradient_checkpointing=True)).gradient_checkpointing


def test_resume_needs_a_checkpoint(tmp_path: Path) -> None:
    for wanted in (True, str(tmp_path / "checkpoint-9")):
        settings = lm_settings(output_dir=str(tmp_path), resume_from_checkpoint=wanted)
        with pytest.raises(SettingsError, match="no whole checkpoint in"):
            training.checkpoint_to_resume(settings)
    (tmp_path / "checkpoint-3").mkdir()
    for method in ("vanilla", "lora"):
        settings = lm_settings(output_dir=str(tmp_path), resume_from_checkpoint=True, method=method)
        assert training.checkpoint_to_resume(settings) == str(tmp_path / "checkpoint-3")
    settings = lm_settings(output_dir=str(tmp_path), resume_from_checkpoint=True, method="subquad")
    with pytest.raises(SettingsError, match="no whole checkpoint in"):  # an empty one, left by a crash
        training.checkpoint_to_resume(settings)


# End to end


def test_folders_load_as_data_sets(data_folder: Path) -> None:
    settings = lm_settings(train_file=None, eval_file=None, dataset=str(data_folder), max_eval_rows=3)
    assert len(data.load_rows(settings, "train").dataset) == 40
    assert len(data.load_rows(settings, "eval").dataset) == 3
    with pytest.raises(DataError, match=r"cannot load data set .*, split nope"):
        data.load_rows(
            lm_settings(train_file=None, eval_file=None, dataset=str(data_folder), train_split="nope"), "train"
        )


def plain_loss(config: Path, folder: Path, data_folder: Path) -> float:
    """Evaluation loss of a saved checkpoint, loaded as anyone would, over all eval rows as one batch."""
    rows = [json.loads(line) for line in (data_folder / "test.jsonl").read_text().splitlines()]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if architecture(config.name) == "bert":
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        batch = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
        batch["labels"] = torch.tensor([row["label"] for row in rows])
    else:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        chat = "long-prompt" in config.name
        question = "Which module of Python's standard library is this function from?\n\n"
        pairs = [
            (question + row["text"], f"w{row['label']}")
            if chat
            else (f"Question: {row['question']}\nAnswer:", f" {row['answer']}")
            for row in rows
        ]
        coded = [lm_data.encode_pair(*pair, tokenizer, 256, "answers", chat) for pair in pairs]
        batch = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=N)(coded)
    with torch.no_grad():
        return float(model(**batch).loss)


# Others of the same architectures are slow, as are the other methods.
RUN = ("bert-base-subquad", "llama-3.2-1b-subquad", "opt-1.3b-subquad", "smollm2-135m-long-prompt-subquad")


@pytest.mark.parametrize(
    "config",
    [pytest.param(path, marks=[] if path.stem in RUN else pytest.mark.slow, id=path.stem) for path in CONFIGS],
)
def test_recipe_runs_and_leaves_a_plain_checkpoint(
    config: Path, models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    # At these sizes a plan would be dense.
    sparse = ["active=0.25"] if config.stem.endswith("subquad") else []
    results = run(config, models_folder, data_folder, tmp_path, *sparse)
    folder = tmp_path / "dry-run"
    assert Path(results["checkpoint"]) == folder / "final"
    assert json.loads((folder / "results.json").read_text())["eval_loss_dense"] == results["eval_loss_dense"]
    assert results["steps"] == 2
    assert results["eval_loss_dense"] == pytest.approx(plain_loss(config, folder / "final", data_folder), rel=1e-4)
    assert ("eval_accuracy" in results) == ("long-prompt" in config.stem or architecture(config.name) == "bert")
    if results["method"] == "subquad":
        assert 0 < abs(results["eval_loss_sparse"] - results["eval_loss_dense"]) < 1  # not the dense forward again
    else:
        assert results["eval_loss_sparse"] is None

    source = models_folder / architecture(config.name)
    before, after = load_file(source / "model.safetensors"), load_file(folder / "final" / "model.safetensors")
    if architecture(config.name) == "bert":  # another head than the pretrained model's
        AutoModelForSequenceClassification.from_pretrained(source).save_pretrained(tmp_path / "fresh")
        assert after.keys() == load_file(tmp_path / "fresh" / "model.safetensors").keys()
    else:
        assert after.keys() == before.keys()
        saved = json.loads((folder / "final" / "config.json").read_text())
        assert saved == json.loads((source / "config.json").read_text())
    shared = [key for key in before if key in after]
    assert all(after[key].dtype == before[key].dtype for key in shared)
    assert any(not torch.equal(after[key], before[key]) for key in shared)


@pytest.mark.parametrize("method", [*(pytest.param(name, marks=pytest.mark.slow) for name in METHODS[:2]), "subquad"])
def test_resumed_training_equals_unbroken_training(
    method: str, models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    config = RECIPES / f"relu-opt-14m-{method}.yaml"

    def train(output: Path, *more: str) -> dict:
        common = ["lr_scheduler_type=constant", "logging_steps=1", "save_steps=2", "eval_steps=9"]
        if method == "subquad":  # a plan depends on measured times, and these runs would have one each
            common.append("active=0.25")
        return run(config, models_folder, data_folder, output, *common, *more, dry=False)

    unbroken = train(tmp_path / "a", "max_steps=4")
    train(tmp_path / "b", "max_steps=2")
    resumed = train(tmp_path / "b", "max_steps=4", "resume_from_checkpoint=true")
    assert [row["step"] for row in resumed["log"] if "loss" in row] == [1, 2, 3, 4]
    assert resumed["eval_loss_dense"] == pytest.approx(unbroken["eval_loss_dense"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bf16_with_checkpointing(
    dtype: str, method: str, models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    config = RECIPES / f"swiglu-llama-14m-{method}.yaml"
    more = ("bf16=true", f"dtype={dtype}", "gradient_checkpointing=true")
    results = run(config, models_folder, data_folder, tmp_path, *more)
    folder = tmp_path / "dry-run" / "final"
    # A few roundings of 2**-8 (bf16) each lie between the loss under autocast and that of the saved weights.
    expected = plain_loss(config, folder, data_folder)
    assert results["eval_loss_dense"] == pytest.approx(expected, rel=2**-6)
    after = load_file(folder / "model.safetensors")
    assert {str(weight.dtype) for weight in after.values()} == {f"torch.{dtype}"}


@pytest.mark.parametrize("rest", ["frozen", "full"])
def test_other_treatments_of_what_is_not_patched(
    rest: str, models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    config = RECIPES / "swiglu-llama-14m-subquad.yaml"
    run(config, models_folder, data_folder, tmp_path, f"rest={rest}")
    before = load_file(models_folder / "llama" / "model.safetensors")
    after = load_file(tmp_path / "dry-run" / "final" / "model.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    patched = {key for key in before if ".mlp." in key}
    assert changed & patched
    assert bool(changed - patched) == (rest == "full")


def test_too_long_sequences_and_missing_models_are_refused(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    config = RECIPES / "relu-opt-14m-vanilla.yaml"
    with pytest.raises(SettingsError, match="max_length: 600 exceeds the model's 512 positions"):
        run(config, models_folder, data_folder, tmp_path, "max_length=600")
    with pytest.raises(SettingsError, match="there is no folder"):
        run(config, models_folder, data_folder, tmp_path, "model=./no/such/model")


def launch(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """What `accelerate launch` does with the CPU's config, from this process, which has imported it.

    Raises:
        CalledProcessError: the recipe failed.
    """
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])))
    parser = launch_command_parser()
    launch_command(
        parser.parse_args(["--config_file", "recipes/accelerate/cpu.yaml", "recipes/finetune_lm.py", *arguments])
    )


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["here", "apart"])
def test_accelerate_launch(
    apart: bool, models_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """By default the script runs in this process, with the arguments and the environment that the launcher gives it."""

    launcher = sys.modules[launch_command.__module__]

    def here(args: Any) -> None:
        command, environment = launcher.prepare_simple_launcher_cmd_env(args)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert command[1] == "recipes/finetune_lm.py"
        finetune_lm.main(command[2:])

    if not apart:
        monkeypatch.setattr(launcher, "simple_launcher", here)
    run_of = ["--config", "recipes/relu-opt-14m-lora.yaml", "--dry-run", "--set", f"model={models_folder / 'opt'}"]
    files = [f"train_file={data_folder / 'train.jsonl'}", f"eval_file={data_folder / 'test.jsonl'}"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch(monkeypatch, *run_of, *files, f"output_dir={tmp_path}")
    if apart:
        assert f"plain checkpoint: {tmp_path}/dry-run/final" in capfd.readouterr().out
    assert json.loads((tmp_path / "dry-run" / "results.json").read_text())["device"].startswith("cpu")


@pytest.mark.slow
def test_mistakes_end_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "recipes/finetune_lm.py", "--config", str(tmp_path / "none.yaml")],
        cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: cannot read" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu-opt-14m", "relu-opt-wide-16m", "swiglu-llama-14m"])
@pytest.mark.parametrize("method", METHODS)
def test_gsm8k_for_real(name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (REPOSITORY / ".." / "shared" / "models" / name).is_dir():
        pytest.skip(f"needs ../shared/models/{name}")
    launch(monkeypatch, "--config", f"recipes/{name}-{method}.yaml", "--set", f"output_dir={tmp_path}")
    results = json.loads((tmp_path / "results.json").read_text())
    losses = [row["loss"] for row in results["log"] if "loss" in row]
    assert results["steps"] == 300
    assert results["eval_loss_dense"] < losses[0]
