"""What tests of TRL's trainers share: a tokenizer, a model with its vocabulary, pairs of answers, and settings."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .models import build

CONTENTS = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # a chat template


def demo_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerBase:
    loaded = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "scripts" / "demo_model")
    loaded.chat_template = chat_template
    return loaded


def llama_for(tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    return build("llama", vocab_size=len(tokenizer), max_position_embeddings=64)


def pairs() -> Dataset:
    """Prompts, each with an answer to prefer and one to reject, of different lengths."""
    rows = range(8)
    return Dataset.from_dict(
        {
            "prompt": [f"What is {i} times {i}?" for i in rows],
            "chosen": [f" It is {i * i}." for i in rows],
            "rejected": [f" I do not know, {'perhaps ' * (1 + i % 3)}{i}." for i in rows],
        }
    )


def settings(folder: Path, **values: Any) -> dict[str, Any]:
    """Of a short run on the CPU."""
    usual = dict(
        output_dir=str(folder), use_cpu=True, bf16=False, per_device_train_batch_size=4, learning_rate=1e-2,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return {**usual, **values}
