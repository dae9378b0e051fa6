"""The model and the data of a run: from a checkpoint and files, or random of a given shape."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from data import DataError, load_rows
from lm_data import NO_LOSS, make_sequences
from peft import prepare_model_for_kbit_training
from settings import LmSettings
from training import load_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from .random_rows import random_rows
from .settings import RunSettings, Shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Inputs(NamedTuple):
    """Attributes: `collate` makes a batch of rows; `evaluation` is empty and `tokenizer` None for a random shape."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    train: Sequence[Any]
    evaluation: Sequence[Any]
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]


def load_inputs(settings: RunSettings) -> Inputs:
    """Model and data; both are the same for the same settings, whatever the method.

    Raises:
        data.DataError, settings.SettingsError: files or a model that cannot be used; the message says why.
    """
    if settings.shape is not None:
        return _random_inputs(settings, settings.shape)
    recipe = LmSettings(
        model=settings.model,
        method=settings.method,
        output_dir="",
        train_file=settings.train_file,
        eval_file=settings.eval_file,
        max_length=settings.seq_length,
        max_eval_rows=settings.max_eval_rows if "prompt_template" in settings.data else None,  # blocks are cut below
        **settings.data,
    )
    tokenizer = load_tokenizer(recipe)
    dtype = DTYPES[settings.dtype]
    quantized: dict[str, Any] = {}
    if settings.quantize:
        form = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.quantize,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if settings.autocast else dtype,
        )
        quantized = {"quantization_config": form, "device_map": {"": settings.device}}
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype, attn_implementation="sdpa", **quantized)
    if quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=settings.gradient_checkpointing)
    train, evaluation = (_sequences(recipe, part, tokenizer) for part in ("train", "eval"))
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=NO_LOSS)
    return Inputs(model, tokenizer, train, evaluation[: settings.max_eval_rows], collate)


def _sequences(recipe: LmSettings, part: Any, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Token sequences. Of plain text only full blocks, so that every step has the same number of tokens."""
    rows = load_rows(recipe, part)
    sequences = make_sequences(rows, tokenizer, recipe).dataset.to_list()
    if recipe.prompt_template is None or recipe.packing:
        sequences = [row for row in sequences if len(row["input_ids"]) == recipe.max_length]
        if not sequences:
            raise DataError(f"{rows.source} holds less than one block of {recipe.max_length} tokens")
    return sequences


def _random_inputs(settings: RunSettings, shape: Shape) -> Inputs:
    torch.manual_seed(settings.seed)
    with torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(
            shape_config(shape, settings.seq_length), dtype=DTYPES[settings.dtype], attn_implementation="sdpa"
        )
    # Enough for every step of a short run; a long one goes round.
    count = min(max(settings.steps, 8), 64) * settings.batch_size
    rows = random_rows(count, settings.seq_length, shape.vocab, shape.padding, shape.context, settings.seed)
    return Inputs(model, None, rows, [], default_data_collator)


def shape_config(shape: Shape, positions: int) -> PretrainedConfig:
    """Configuration of a random model: heads of 64 (of the whole hidden size where it is smaller), no dropout."""
    heads = shape.hidden // 64 if shape.hidden % 64 == 0 else 1
    common = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
    }
    if shape.arch == "llama":
        kv_heads = shape.kv_heads or heads
        sizes = {"intermediate_size": shape.intermediate, "num_key_value_heads": kv_heads}
        return LlamaConfig(**common, **sizes, tie_word_embeddings=True)
    return OPTConfig(
        **common, ffn_dim=shape.intermediate, word_embed_proj_dim=shape.hidden, dropout=0.0, attention_dropout=0.0
    )
