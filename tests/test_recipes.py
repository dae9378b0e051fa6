"""The recipes: settings, data, and every YAML end to end on tiny random models of its architecture."""

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
from tokenizers import Tokenizer, models, pre_tokenizers, processors

pytest.importorskip("peft")
pytest.importorskip("datasets")
yaml = pytest.importorskip("yaml")

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = REPOSITORY / "recipes"
sys.path.insert(0, str(RECIPES))

import classifier_data  # noqa: E402
import data  # noqa: E402
import finetune_classifier  # noqa: E402
import finetune_lm  # noqa: E402
import lm_data  # noqa: E402
import settings as recipe_settings  # noqa: E402
import training  # noqa: E402
from accelerate.commands.launch import launch_command, launch_command_parser  # noqa: E402
from data import DataError  # noqa: E402
from datasets import Dataset  # noqa: E402
from settings import ClassifierSettings, LmSettings, SettingsError  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

METHODS = ("vanilla", "lora", "subquad")
NAMES = (
    "bert-base", "llama-3.2-1b", "minilm", "opt-1.3b", "relu-opt-14m", "relu-opt-wide-16m", "smollm2-135m",
    "smollm2-135m-long-prompt", "swiglu-llama-14m",
)  # fmt: skip
ARCHITECTURES = {"minilm": "bert", "smollm2": "llama"}  # where the name does not say it
CHAT = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + ' </s> ' }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
CONFIGS = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "accelerate")
WORDS = [f"w{number}" for number in range(38)] + ["user:", "assistant:", "Question:", "Answer:", "\n"]
N, IGNORE = lm_data.NO_LOSS, -100


# Models and data, made in memory


def word_tokenizer(bos: bool = False, cls: bool = False) -> PreTrainedTokenizerFast:
    """One token a word; [BOS] before or [CLS] and [SEP] around every text if asked for."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    if cls:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=CHAT,
    )  # fmt: skip


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(word) for word in text.split(" ")]


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


def lm_settings(**values: Any) -> LmSettings:
    base = {"model": "m", "method": "vanilla", "output_dir": "o", "train_file": "a.jsonl", "eval_file": "b.jsonl"}
    return recipe_settings.settings_from_mapping(LmSettings, base | values)


def qa_settings(**values: Any) -> LmSettings:
    templates = {"prompt_template": "Question: {question} Answer:", "answer_template": " {answer}"}
    return lm_settings(**(templates | {"loss_on": "answers"} | values))


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


# Data of language models


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("loss_on", ["answers", "all"])
def test_prompt_and_answer_token_by_token(bos: bool, loss_on: str) -> None:
    tokenizer = word_tokenizer(bos=bos)
    rows = data.Rows(Dataset.from_list([{"question": "w1 w2", "answer": "w3", "other": 0}]), "file")
    sequences = lm_data.make_sequences(rows, tokenizer, qa_settings(loss_on=loss_on, max_length=50)).dataset
    prompt = [1] * bos + ids(tokenizer, "Question: w1 w2 Answer:")
    answer = ids(tokenizer, "w3") + [2]
    assert 3 not in prompt + answer  # no unknown token: the comparison sees every word
    assert sequences.column_names == ["input_ids", "attention_mask", "labels"]
    assert sequences[0]["input_ids"] == prompt + answer
    assert sequences[0]["attention_mask"] == [1] * len(prompt + answer)
    assert sequences[0]["labels"] == ([IGNORE] * len(prompt) if loss_on == "answers" else prompt) + answer


def test_truncation_cuts_answers_and_leaves_out_rows_without_any() -> None:
    tokenizer = word_tokenizer()
    rows = data.Rows(
        Dataset.from_list(
            [
                {"question": "w1", "answer": "w2 w3 w4"},  # 3 tokens of prompt: two of the answer fit
                {"question": "w1 w2 w3 w4", "answer": "w5"},  # 6 tokens of prompt: none fits
                {"question": "w1", "answer": "w6"},  # fits, EOS included
            ]
        ),
        "file",
    )
    sequences = lm_data.make_sequences(rows, tokenizer, qa_settings(max_length=5))
    expected = [ids(tokenizer, "w2 w3"), [*ids(tokenizer, "w6"), 2]]
    assert [row["labels"] for row in sequences.dataset] == [[IGNORE] * 3 + answer for answer in expected]
    assert [len(row["input_ids"]) for row in sequences.dataset] == [5, 5]
    assert "3 rows, 2 sequences, 10 tokens, 4 of them with loss; 2 sequences of max_length 5" in sequences.summary
    assert "1 left out" in sequences.summary
    with pytest.raises(DataError, match="no token to learn from within max_length: 3"):
        lm_data.make_sequences(rows, tokenizer, qa_settings(max_length=3))


@pytest.mark.parametrize("bos", [False, True])
def test_plain_text_is_packed_without_losing_a_token(bos: bool) -> None:
    tokenizer = word_tokenizer(bos=bos)
    documents = ["w0 w1 w2", "w3", "w4 w5 w6 w7 w8"]
    rows = data.Rows(Dataset.from_dict({"text": documents}), "file")
    blocks = lm_data.make_sequences(rows, tokenizer, lm_settings(max_length=4)).dataset
    stream = [token for text in documents for token in [1] * bos + ids(tokenizer, text) + [2]]
    assert [token for block in blocks for token in block["input_ids"]] == stream
    assert [len(block["input_ids"]) for block in blocks] == [4] * (len(stream) // 4) + [3] * bool(len(stream) % 4)
    assert all(block["labels"] == block["input_ids"] for block in blocks)


def test_a_last_block_of_one_token_is_left_out() -> None:
    rows = data.Rows(Dataset.from_dict({"text": ["w0 w1 w2 w3"]}), "file")  # 5 tokens with EOS
    blocks = lm_data.make_sequences(rows, word_tokenizer(), lm_settings(max_length=4))
    assert len(blocks.dataset) == 1 and "1 left out" in blocks.summary


def test_text_files_keep_their_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w1 w2\nw3\n\nw4")
    rows = data.load_rows(lm_settings(train_file=str(tmp_path / "a.txt")), "train")
    tokenizer = word_tokenizer()
    block = lm_data.make_sequences(rows, tokenizer, lm_settings(max_length=20)).dataset[0]
    assert tokenizer.convert_ids_to_tokens(block["input_ids"]) == ["w1", "w2", "\n", "w3", "\n", "\n", "w4", "</s>"]


def test_batches_are_padded_to_their_longest_without_loss() -> None:
    tokenizer = word_tokenizer()
    rows = [lm_data.encode_pair("w1", " ".join(["w2"] * n), tokenizer, 50, "answers") for n in (1, 4)]
    batch = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=N)(rows)
    assert batch["input_ids"].shape == (2, 6)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert batch["labels"][0].tolist() == [IGNORE, *ids(tokenizer, "w2"), 2, IGNORE, IGNORE, IGNORE]


def test_chat_puts_the_prompt_into_the_template_and_the_answer_after_it() -> None:
    tokenizer = word_tokenizer(bos=True)  # the template, not the tokenizer, says where a chat begins
    rows = data.Rows(Dataset.from_list([{"question": "w1 w2", "answer": "w3"}]), "file")
    settings = qa_settings(prompt_template="{question}", answer_template="{answer}", chat=True)
    row = lm_data.make_sequences(rows, tokenizer, settings).dataset[0]
    prompt = ids(tokenizer, "user: w1 w2 </s> assistant:")
    assert 3 not in prompt
    assert row["input_ids"] == prompt + ids(tokenizer, "w3") + [2]
    assert row["labels"] == [IGNORE] * len(prompt) + ids(tokenizer, "w3") + [2]
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="chat: the tokenizer of m has no chat template"):
        lm_data.make_sequences(rows, tokenizer, settings)


@pytest.mark.parametrize("loss_on", ["answers", "all"])
def test_packing_joins_sequences_and_loses_no_token(loss_on: str) -> None:
    tokenizer = word_tokenizer(bos=True)
    rows = data.Rows(
        Dataset.from_list([{"question": f"w{i} w9", "answer": " ".join(["w7"] * i)} for i in range(1, 6)]), "file"
    )
    plain, packed = (
        lm_data.make_sequences(rows, tokenizer, qa_settings(loss_on=loss_on, max_length=n, packing=packing)).dataset
        for n, packing in ((50, False), (12, True))
    )
    for name in ("input_ids", "labels"):
        assert [token for row in packed for token in row[name]] == [token for row in plain for token in row[name]]
    assert [len(row["input_ids"]) for row in packed][:-1] == [12] * (len(packed) - 1) and len(packed) == 4
    assert any(IGNORE in row["labels"] for row in packed) == (loss_on == "answers")


def test_accuracy_counts_answers_that_are_right_to_the_last_token() -> None:
    labels = torch.tensor([[N, N, 5, 6], [N, N, 5, 6], [N, N, 7, N], [N, N, 7, N]])
    logits = torch.nn.functional.one_hot(
        torch.tensor([[9, 5, 6, 0], [9, 5, 9, 0], [9, 7, 9, 0], [9, 9, 7, 0]]), 10
    ).float()  # the token after position i is predicted at position i
    for found in (logits, (logits, torch.zeros(1))):
        tokens = lm_data.predicted_tokens(found, labels).numpy()
        result = lm_data.answer_accuracy(EvalPrediction(tokens, labels.numpy()))
        assert result == {"accuracy": 0.5}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"prompt_template": "{qestion}"}, "no column 'qestion', which prompt_template names.*did you mean 'question'"),
        ({"answer_template": "{}"}, "no column '', which answer_template names"),
        ({"answer_template": "{answer"}, "answer_template is malformed"),
        ({"prompt_template": None, "answer_template": None, "loss_on": "all"}, "no column 'text', which text_column"),
        ({"prompt_template": "{gap}"}, "row 2: nothing in column 'gap'"),
    ],
)
def test_templates_that_do_not_fit_the_data(values: dict[str, Any], message: str) -> None:
    rows = [{"question": "w1", "answer": "w2", "gap": "w3"}, {"question": "w1", "answer": "w2", "gap": None}]
    with pytest.raises(DataError, match=message):
        lm_data.make_sequences(data.Rows(Dataset.from_list(rows), "file"), word_tokenizer(), qa_settings(**values))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.txt", b"", "is empty"),
        ("a.jsonl", b'{"q": 1}\n{"q":\n', "line 2, is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1, must be an object"),
        ("a.jsonl", b'{"q": 1}\n{"r": 1}\n', "line 2, has the keys r; the first line has q"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.csv", b"q\n1\n", "files must end in .jsonl or .txt"),
        (None, b"", "cannot read .*nothing.jsonl: No such file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str | None, content: bytes, message: str) -> None:
    path = tmp_path / (name or "nothing.jsonl")
    if name:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        data.load_rows(lm_settings(train_file=str(path)), "train")
    assert str(path) in str(error.value)


def test_folders_load_as_data_sets(data_folder: Path) -> None:
    settings = lm_settings(train_file=None, eval_file=None, dataset=str(data_folder), max_eval_rows=3)
    assert len(data.load_rows(settings, "train").dataset) == 40
    assert len(data.load_rows(settings, "eval").dataset) == 3
    with pytest.raises(DataError, match=r"cannot load data set .*, split nope"):
        data.load_rows(
            lm_settings(train_file=None, eval_file=None, dataset=str(data_folder), train_split="nope"), "train"
        )


# Data of classifiers


def classifier_settings(**values: Any) -> ClassifierSettings:
    base = {"model": "m", "method": "vanilla", "output_dir": "o", "train_file": "a", "eval_file": "b"}
    return recipe_settings.settings_from_mapping(ClassifierSettings, base | values)


def test_classes_pairs_and_truncation() -> None:
    rows = data.Rows(
        Dataset.from_list([{"text": "w1 w2", "b": "w3", "label": "yes"}, {"text": "w4", "b": "w5", "label": "no"}]),
        "file",
    )
    tokenizer = word_tokenizer(cls=True)
    settings = classifier_settings(text_pair_column="b", max_length=6)
    labels = classifier_data.find_labels(rows, settings)
    assert labels == (["no", "yes"], ["no", "yes"])
    examples = classifier_data.make_examples(rows, labels, tokenizer, settings)
    assert examples["labels"] == [1, 0]
    assert examples[0]["input_ids"] == [1, *ids(tokenizer, "w1 w2"), 2, *ids(tokenizer, "w3"), 2]
    short = classifier_data.make_examples(rows, labels, tokenizer, classifier_settings(max_length=3))
    assert short[0]["input_ids"] == [1, *ids(tokenizer, "w1"), 2]


@pytest.mark.parametrize(
    "rows, values, message",
    [
        (
            [{"text": "w1", "label": 0.5}, {"text": "w1", "label": 1.5}],
            {},
            "must be all integers or all texts, got float",
        ),
        ([{"text": "w1", "label": 1}], {}, "only one class in 'label': 1"),
        ([{"text": "w1", "label": 0}, {"text": None, "label": 1}], {}, "row 2: nothing in column 'text'"),
        ([{"text": "w1", "label": 0}], {"label_column": "lable"}, "no column 'lable'.*did you mean 'label'"),
        ([{"text": "w1", "label": 0}, {"text": "w1", "label": 1}], {"text_pair_column": "p"}, "no column 'p'"),
    ],
)
def test_data_that_cannot_be_classified(rows: list[dict[str, Any]], values: dict[str, Any], message: str) -> None:
    source, settings = data.Rows(Dataset.from_list(rows), "file"), classifier_settings(**values)
    with pytest.raises(DataError, match=message):
        labels = classifier_data.find_labels(source, settings)
        classifier_data.make_examples(source, labels, word_tokenizer(cls=True), settings)


def test_hidden_test_labels_are_refused() -> None:
    rows = data.Rows(Dataset.from_list([{"text": "w1", "label": -1}]), "file")
    with pytest.raises(DataError, match=r"label -1 is none of the training classes .*evaluate on another split"):
        labels = classifier_data.Labels([0, 1], ["a", "b"])
        classifier_data.make_examples(rows, labels, word_tokenizer(cls=True), classifier_settings())


# End to end


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
