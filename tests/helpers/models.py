"""Tiny models of every supported family, from configurations in memory, with weights that can expose mistakes.

Shapes are odd on purpose: no two of batch, sequence, width, neurons and rank are equal, and the number of tokens does
not divide into tiles.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_subquad import SubquadConfig, patch_model

BATCH, LENGTH, VOCABULARY, WIDTH, NEURONS, LAYERS = 3, 5, 61, 20, 52, 3
TOKENS = BATCH * LENGTH  # 15 tokens at tile_size 5: 4 tiles of 4 slots, one of them spare

CONFIG = SubquadConfig(rank=3, alpha=5.0, tile_size=5, sketch_rank=12, active=0.4, layers_to_transform="all_but_first")

_LLAMA = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=LAYERS,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False,
    bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
_BERT = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=LAYERS,
    num_attention_heads=2, max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
_T5 = dict(
    vocab_size=VOCABULARY, d_model=WIDTH, d_kv=10, d_ff=NEURONS, num_layers=LAYERS, num_heads=2, dropout_rate=0.0,
    decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
)  # fmt: skip
_BART = dict(
    vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=NEURONS, decoder_ffn_dim=NEURONS, dropout=0.0,
    bos_token_id=0, eos_token_id=1, pad_token_id=2, decoder_start_token_id=1,
)  # fmt: skip

# Family name: (model class, configuration class, configuration).
_CHECKED_IN_FULL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "opt": (
        "OPTForCausalLM", "OPTConfig",
        dict(vocab_size=VOCABULARY, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=NEURONS, dropout=0.0,
             num_hidden_layers=LAYERS, num_attention_heads=2, max_position_embeddings=32, bos_token_id=0,
             eos_token_id=1, pad_token_id=2),
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "mlp_bias": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_LLAMA, "sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_LLAMA, "head_dim": 10, "tie_word_embeddings": True}),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        dict(vocab_size=VOCABULARY, n_embd=WIDTH, n_inner=NEURONS, n_layer=LAYERS, n_head=2, n_positions=32,
             resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1),
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM", "GPTNeoXConfig",
        dict(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=LAYERS,
             num_attention_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=1),
    ),
    "bert": ("BertForMaskedLM", "BertConfig", _BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _BERT),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**_T5, "feed_forward_proj": "relu"}),
    "t5_gated": ("T5ForConditionalGeneration", "T5Config", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _LLAMA),
    "vit": (
        "ViTForImageClassification", "ViTConfig",
        dict(hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=LAYERS, num_attention_heads=2,
             image_size=8, patch_size=4, num_labels=7, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    ),
}  # fmt: skip
_FOR_SINGLE_TESTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_LLAMA, "head_dim": 10}),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**_BART, "max_position_embeddings": 32}),
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig",
        {**_BART, "max_source_positions": 16, "max_target_positions": 16},
    ),
    "phi": (
        "PhiForCausalLM", "PhiConfig",
        dict(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=LAYERS,
             num_attention_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=1),
    ),
}  # fmt: skip

_FAMILIES = _CHECKED_IN_FULL | _FOR_SINGLE_TESTS
FAMILIES = tuple(_CHECKED_IN_FULL)
ENCODER_DECODERS = ("t5", "t5_gated")


def build(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """A tiny model in training mode; the same one for the same arguments. Biases and norms are not trivial."""
    model_class, config_class, values = _FAMILIES[family]
    config = getattr(transformers, config_class)(**{**values, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, family)))
        model = getattr(transformers, model_class)(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:  # biases around 0, norm weights around 1 (around 0 where they count from 1)
                    parameter.add_(0.3 * torch.randn_like(parameter))
                elif "emb" not in name:
                    parameter.copy_(torch.randn_like(parameter) * (0.8 / parameter.shape[-1] ** 0.5))
    return model.to(dtype).train()


def opt(dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    return build("opt", dtype, **settings)


def llama(dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    return build("llama", dtype, **settings)


def batch(family: str, model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Inputs with a leaf tensor that takes gradients: embeddings of tokens, or pixels."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    if family == "vit":
        return {"pixel_values": torch.randn(BATCH, 3, 8, 8, generator=generator).to(dtype).requires_grad_()}
    embeddings = torch.randn(BATCH, LENGTH, WIDTH, generator=generator).to(dtype).requires_grad_()
    inputs = {"inputs_embeds": embeddings}
    if family in ENCODER_DECODERS:
        inputs["decoder_input_ids"] = tokens(seed + 1)
    return inputs


def leaf(inputs: dict[str, Tensor]) -> Tensor:
    """The tensor of a `batch` that takes gradients."""
    return next(value for value in inputs.values() if value.requires_grad)


def tokens(seed: int = 0, shape: tuple[int, ...] = (BATCH, LENGTH)) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def objective(values: Tensor) -> Tensor:
    """A scalar whose gradient differs from entry to entry."""
    generator = torch.Generator().manual_seed(5)
    return (values * torch.randn(values.shape, generator=generator).to(values.dtype)).sum()


def fill_updates(model: nn.Module, seed: int = 3, size: float = 0.3) -> None:
    """Give every U and V of a patched model random values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".update.U", ".update.V")):
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def trained(
    family: str = "opt", dtype: torch.dtype = torch.float32, seed: int = 3, size: float = 0.3, **values: Any
) -> nn.Module:
    """A model that is patched by CONFIG with other `values`, its updates as if they had been trained."""
    model = patch_model(build(family, dtype), replace(CONFIG, **values))
    fill_updates(model, seed, size)
    return model


def checkpoint_activations(model: nn.Module, reentrant: bool) -> None:
    """By the method's newer name where there is one: that version warns of the old one."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a refused patch must leave alone: modules, parameters, values, flags, memory layout, mode."""
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "parameters": [
            (name, id(value), value.requires_grad, value.dtype, value.stride(), value.is_contiguous())
            for name, value in model.named_parameters(remove_duplicate=False)
        ],
        "hooks": [
            (name, len(module._forward_pre_hooks), len(module._forward_hooks), "forward" in module.__dict__)
            for name, module in model.named_modules()
        ],
        "values": {name: value.clone() for name, value in model.state_dict().items() if not value.is_meta},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for part in ("modules", "parameters", "hooks"):
        assert before[part] == after[part], part
    assert list(before["values"]) == list(after["values"])
    for name, value in before["values"].items():
        assert torch.equal(value.nan_to_num(), after["values"][name].nan_to_num()), name


Factory = Callable[[], nn.Module]
