"""A tokenizer of a few words, and settings, for tests of the recipes."""

from typing import Any

import lm_data
import settings as recipe_settings
from settings import LmSettings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + ' </s> ' }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
WORDS = [f"w{number}" for number in range(38)] + ["user:", "assistant:", "Question:", "Answer:", "\n"]
N, IGNORE = lm_data.NO_LOSS, -100


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


def lm_settings(**values: Any) -> LmSettings:
    base = {"model": "m", "method": "vanilla", "output_dir": "o", "train_file": "a.jsonl", "eval_file": "b.jsonl"}
    return recipe_settings.settings_from_mapping(LmSettings, base | values)


def qa_settings(**values: Any) -> LmSettings:
    templates = {"prompt_template": "Question: {question} Answer:", "answer_template": " {answer}"}
    return lm_settings(**(templates | {"loss_on": "answers"} | values))
