"""The model and the data of a run: from a checkpoint and files, or random of a given shape."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from data import DataError, load_rows
from lm_data import NO_LOSS, make_sequences
from peft import prepare_model_for_kbit_training
from settings import LmSettings
from torch.utils.data import DataLoader
from training import load_tokenizer
from transformers import (
    AutoConfig,
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

_LIBRARIES = 700_000_000
# Copies of the weights, and values that a layer keeps of a token, in units of its sizes; adapters keep more.
_KEPT = {"full": (4, 12, 4), "low_rank": (1, 20, 6)}

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


def padded_batches(recipe: LmSettings, part: Any, size: int) -> list[dict[str, torch.Tensor]]:
    """Batches of `size` prompts with their answers, each padded to its longest row."""
    tokenizer = load_tokenizer(recipe)
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=NO_LOSS)
    return [dict(batch) for batch in DataLoader(_sequences(recipe, part, tokenizer), size, collate_fn=collate)]


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


def expected_memory(settings: RunSettings) -> dict[str, int]:
    """About how many bytes a process of each kind of training will take on a CPU, at most: "full" (every weight is
    trained) and "low_rank". For a batch of the longest sequences.

    Counted are libraries, weights (trained in full: with gradients and two moments), what a transformer layer keeps of
    its tokens for the backward pass, and logits with their gradient and softmax. Freed memory that the allocator keeps
    comes on top.
    """
    if settings.shape is not None:
        config = shape_config(settings.shape, settings.seq_length)
    else:
        config = AutoConfig.from_pretrained(settings.model)
    with torch.device("meta"):
        weights = sum(w.numel() for w in AutoModelForCausalLM.from_config(config).parameters())
    size = DTYPES[settings.dtype].itemsize
    tokens = settings.batch_size * settings.seq_length
    neurons = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * config.hidden_size
    logits = 3 * tokens * config.vocab_size * 4  # the loss is computed in fp32
    found = {}
    for kind, (copies, of_hidden, of_neurons) in _KEPT.items():
        kept = tokens * config.num_hidden_layers * (of_hidden * config.hidden_size + of_neurons * neurons) * size
        found[kind] = _LIBRARIES + copies * weights * size + kept + logits
    return found
