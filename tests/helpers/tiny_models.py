"""A tiny random model of every model type that transformers has, from a configuration in memory.

Types are discovered. Their default configurations are shrunk by the names of their settings, so that a new type needs
nothing here unless its settings depend on each other.
"""

import inspect
import itertools
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import configuration_auto, modeling_auto

WIDTH, NEURONS, VOCABULARY = 32, 144, 128  # no other size is as large as NEURONS
BATCH, LENGTH = 3, 7
LARGEST = 30_000_000  # parameters of a model that still counts as tiny

# The class of a type is the first of these that it has, else its model without a head.
_HEADS = (
    "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "CAUSAL_LM", "CTC",
    "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION",
)  # fmt: skip

_SIZES = {
    WIDTH: """hidden_size d_model n_embd dim embed_dim embedding_size embedding_dim emb_dim word_embed_proj_dim
        out_hidden_size output_hidden_size projection_dim hidden_size_global text_hidden_size encoder_hidden_size
        decoder_hidden_size hidden_dim decoder_hidden_dim model_dim output_dim conv_dim attention_window hidden_sizes
        iou_head_hidden_dim feature_projection_input_dim""",
    NEURONS: """intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff n_inner d_inner mlp_dim ffn_hidden_size
        decoder_intermediate_size encoder_linear_units decoder_linear_units""",
    0: "pad_token_id mask_time_prob mask_feature_prob layerdrop encoder_layerdrop decoder_layerdrop",
    1: "bos_token_id decoder_start_token_id prediction_length mamba_n_groups",
    2: """num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers depth
        decoder_num_hidden_layers encoder_num_hidden_layers conf_num_hidden_layers eos_token_id num_experts_per_tok
        depths num_frames""",
    4: """num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads
        decoder_num_attention_heads attention_heads num_query_heads num_key_value_heads n_kv_heads num_kv_heads
        num_experts n_routed_experts num_local_experts patch_size num_conv_pos_embedding_groups""",
    8: """head_dim d_kv d_head v_head_dim dim_head rotary_dim qk_rope_head_dim qk_nope_head_dim mamba_n_heads
        mamba_d_head chunk_size mamba_chunk_size context_size linear_num_value_heads linear_num_key_heads
        linear_key_head_dim linear_value_head_dim""",
    16: """image_size qk_head_dim q_lora_rank kv_lora_rank mamba_d_state state_size ssm_state_size num_mel_bins
        max_source_positions""",
    48: "moe_intermediate_size",
    64: "max_position_embeddings n_positions max_seq_len max_target_positions",
    VOCABULARY: """vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size entity_vocab_size
        pronunciation_vocab_size shape_vocab_size""",
}  # fmt: skip
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}

# Tried in this order beside the main input and those without a default.
_MORE_INPUTS = (
    (), ("pixel_values",), ("decoder_input_ids",), ("attention_mask",), ("pixel_values", "input_ids"), ("bbox",),
)  # fmt: skip

# Settings of a type that do not follow from names; in a dict of a part of its configuration where they stand there.
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "distilbert": {"hidden_dim": NEURONS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
}
for _type in ("glm4v_text", "glm4v_moe_text", "glm_image_text", "glm_ocr_text", "qwen2_vl_text", "qwen2_5_vl_text"):
    _EXCEPTIONS[_type] = {"rope_parameters": _ROPE}
for _type in (
    "glm46v", "glm4v", "glm4v_moe", "glm_image", "glm_ocr", "glmga", "qwen2_vl", "qwen2_5_vl", "paddleocr_vl",
):  # fmt: skip
    _EXCEPTIONS[_type] = {"text_config": {"rope_parameters": _ROPE}}
for _type in ("swin", "swinv2", "donut-swin", "maskformer-swin"):
    _EXCEPTIONS[_type] = {"image_size": 64, "window_size": 2}  # windows that fit into the last of four stages


class NotBuiltError(Exception):
    """A tiny model of this type cannot be built here; the message says why."""


def model_types() -> list[str]:
    """All model types that have a model, in alphabetical order."""
    return sorted(modeling_auto.MODEL_MAPPING_NAMES)


def class_name(model_type: str) -> str:
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES") for head in _HEADS]
    name = next(names[model_type] for names in (*mappings, modeling_auto.MODEL_MAPPING_NAMES) if model_type in names)
    return name if isinstance(name, str) else name[0]


def tiny_config(model_type: str) -> PreTrainedConfig:
    default = configuration_auto.CONFIG_MAPPING[model_type]()
    return type(default)(**_shrunk(default, _EXCEPTIONS.get(model_type, {})))


def outline(model_type: str) -> nn.Module:
    """The tiny model without weights, on the meta device.

    Raises:
        NotBuiltError: a package is missing, or settings contradict each other.
    """
    with torch.device("meta"):
        return _built(model_type)


def tiny_model(model_type: str) -> nn.Module:
    """A model in float64 and training mode without dropout; the same weights each time, none of them trivial.

    Raises:
        NotBuiltError: as in `outline`, or the model is not tiny.
    """
    size = sum(parameter.numel() for parameter in outline(model_type).parameters())
    if size > LARGEST:
        raise NotBuiltError(f"{size / 1e6:.0f} million parameters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _filled(_built(model_type).double())
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def _built(model_type: str) -> nn.Module:
    try:
        config = tiny_config(model_type)
        config._experts_implementation = "eager"  # the grouped one has no float64
        return getattr(transformers, class_name(model_type))(config)
    except Exception as error:
        raise NotBuiltError(_said(error)) from error


def _said(error: Exception) -> str:
    """The kind of an error and the last line of what it says, which in checks of settings is the one that counts."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip() if type(error).__name__.startswith('Strict') else lines[0]}"


def tiny_batch(model: nn.Module) -> dict[str, Tensor]:
    """The fewest inputs that the model's forward runs on.

    Raises:
        NotBuiltError: none of those known here will do.
    """
    parameters = inspect.signature(model.forward).parameters
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    main = model.main_input_name if model.main_input_name in parameters else None
    least = list(dict.fromkeys([*required, *([main] if main else [])]))
    errors: list[str] = []
    for more, layout in itertools.product(_MORE_INPUTS, range(4)):
        names = [*least, *(name for name in more if name not in least)]
        if set(more) - set(parameters):
            continue
        generator = torch.Generator().manual_seed(1)
        try:
            inputs = {name: _input(name, model.config, layout, generator) for name in names}
            with torch.no_grad():
                model(**inputs)
            return inputs
        except NotBuiltError:
            raise
        except Exception as error:
            errors.append(_said(error))
    raise NotBuiltError(f"does not run on {', '.join(least)}: {errors[0]}")


def _shrunk(config: PreTrainedConfig, exceptions: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            settings[name] = type(value)(**_shrunk(value, exceptions.get(name, {})))
        elif name in _SMALL and type(value) in (int, float, type(None)):
            settings[name] = float(_SMALL[name]) if isinstance(value, float) else _SMALL[name]
        elif name in _SMALL and isinstance(value, list | tuple):
            settings[name] = type(value)([_SMALL[name]] * len(value))
        elif isinstance(value, float) and "drop" in name:
            settings[name] = 0.0
        elif name == "use_cache":
            settings[name] = False
        elif name == "rope_parameters" and "mrope_section" in (value or {}):  # they share half of a head
            settings[name] = {**value, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    return {**settings, **{n: v for n, v in exceptions.items() if not isinstance(settings.get(n), PreTrainedConfig)}}


def _filled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() < 2:  # biases around 0, norm weights around 1 or 0
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * (0.8 / parameter.shape[-1] ** 0.5))
    return model


def _input(name: str, config: PreTrainedConfig, layout: int, generator: torch.Generator) -> Tensor:
    """An input by its name. Layout 1: frames before channels, one channel of sound, features last; 2, 3: patches."""
    parts = [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]

    def setting(*names: str, default: int = 0) -> Any:
        values = (getattr(part, name, None) for name in names for part in parts)
        return next((value for value in values if value is not None), default)

    if name.endswith("input_ids"):
        return torch.randint(10, min(100, setting("vocab_size", default=100)), (BATCH, LENGTH), generator=generator)
    if name == "attention_mask":
        return torch.ones(BATCH, LENGTH, dtype=torch.long)
    if name.endswith("grid_thw"):
        return torch.tensor([[1, 4, 4]] * BATCH)
    if name == "bbox":
        return torch.tensor([1, 2, 5, 8], dtype=torch.float64 if layout else torch.long).expand(BATCH, LENGTH, 4)
    channels = setting("num_channels", "in_channels", default=3)
    if name == "pixel_position_ids":
        return torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(BATCH, 16, 2)
    if name == "hidden_states" or (name == "pixel_values" and layout >= 2):  # patches of images of 4 x 4
        size = channels * setting("temporal_patch_size", default=1) * setting("patch_size", default=4) ** 2
        shape: tuple[int, ...] = (BATCH, 16, size) if layout == 3 else (16 * BATCH, size)
    elif name.startswith("pixel_values"):
        side = setting("image_size", default=32)
        sides = tuple(side) if isinstance(side, list | tuple) else (side, side)
        frames = (setting("num_frames", default=2),) if layout else ()
        shape = (BATCH, *frames, channels, *sides)
    elif name == "input_features":
        features = setting("num_mel_bins", "num_mels", "feature_projection_input_dim", default=80)
        frames = 2 * setting("max_source_positions", default=32)
        shape = (BATCH, frames, features) if layout else (BATCH, features, frames)
    elif name == "input_values":
        shape = (BATCH, 1, 2000) if layout else (BATCH, 2000)
    else:
        raise NotBuiltError(f"no input {name!r} is known")
    return torch.randn(shape, generator=generator, dtype=torch.float64)
