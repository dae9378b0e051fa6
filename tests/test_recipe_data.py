"""The data of the recipes, token by token, and data that they refuse."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

import classifier_data
import data
import lm_data
import settings as recipe_settings
import torch
from data import DataError
from datasets import Dataset
from helpers.recipes import IGNORE, N, ids, lm_settings, qa_settings, word_tokenizer
from settings import ClassifierSettings
from transformers import DataCollatorForSeq2Seq, EvalPrediction

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
