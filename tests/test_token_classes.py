"""Which tokens of a batch are padding, context or predicted?"""

from typing import Any

import pytest
import torch
import transformers
from helpers.models import WIDTH, build
from torch import Tensor, nn

from hf_subquad.layers.classify_tokens import TokenClasses, classify

IGNORED = -100


def rows(*values: list[int]) -> Tensor:
    return torch.tensor(values)


def drawn(classes: TokenClasses) -> list[str]:
    """A letter a token, a word a row: p for predicted, c for context, dots for padding."""
    letters = ["."] * classes.tokens
    for letter, positions in (("p", classes.predicted), ("c", classes.context)):
        assert positions.tolist() == sorted(set(positions.tolist()))
        for position in positions.tolist():
            letters[position] = letter
    if classes.padding:
        assert classes.real is not None
        assert classes.real.tolist() == [i for i, letter in enumerate(letters) if letter != "."]
    else:
        assert classes.real is None
    assert classes.padding == letters.count(".")
    assert classes.shares() == tuple(letters.count(letter) / len(letters) for letter in ".cp")
    columns = classes.shape[1]
    return ["".join(letters[start : start + columns]) for start in range(0, len(letters), columns)]


def found(model: nn.Module, **inputs: Any) -> dict[str, list[str]]:
    return {stack: drawn(classes) for stack, classes in classify(model, inputs).stacks.items()}


IDS = rows([3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8])
RIGHT, LEFT = rows([1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]), rows([0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1])
LABELS_RIGHT = rows([-100, -100, 5, 6, -100, -100], [-100, 4, -100, -100, -100, -100])
LABELS_LEFT = rows([-100, -100, -100, 6, 7, 8], [-100, -100, -100, -100, -100, 8])


def four_dimensional(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, S, S], causal: True or zero where a query sees a key."""
    seen = (mask.bool()[:, None, None, :] & torch.ones(6, 6, dtype=torch.bool).tril()).expand(2, 1, 6, 6)
    return (
        seen if dtype == torch.bool else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    )


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return build("llama")


@pytest.mark.parametrize("kind", ["2-D", "bool", "float32", "bfloat16"])
def test_causal(kind: str, llama: nn.Module) -> None:
    """A label is predicted one token before it, and tokens after the last predicted one reach nothing."""
    dtype = getattr(torch, kind, None)
    right, left = RIGHT, LEFT
    if dtype is not None:
        right, left = four_dimensional(RIGHT, dtype), four_dimensional(LEFT, dtype)
    assert found(llama, input_ids=IDS, attention_mask=right, labels=LABELS_RIGHT) == {"only": ["cpp...", "p....."]}
    assert found(llama, input_ids=IDS, attention_mask=left, labels=LABELS_LEFT) == {"only": [".cppp.", "...cp."]}
    embeds = torch.zeros(2, 6, WIDTH)
    assert found(llama, inputs_embeds=embeds, attention_mask=left, labels=LABELS_LEFT) == {"only": [".cppp.", "...cp."]}


def test_causal_without_a_mask(llama: nn.Module) -> None:
    assert found(llama, input_ids=IDS, labels=LABELS_RIGHT) == {"only": ["cpp...", "p....."]}
    assert found(llama, input_ids=IDS, labels=IDS) == {"only": ["ppppp.", "ppppp."]}
    nothing = torch.full_like(IDS, IGNORED)
    assert found(llama, input_ids=IDS, labels=nothing) == {"only": ["......", "......"]}


def test_packed_rows(llama: nn.Module) -> None:
    """Sequences after one another: what the last token of one would predict is labelled -100."""
    positions = rows([0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3])
    labels = torch.where(positions == 0, IGNORED, IDS)
    assert found(llama, input_ids=IDS, position_ids=positions, labels=labels) == {"only": ["ppcpp.", "pcppp."]}


def test_shifted_labels(llama: nn.Module) -> None:
    shifted = torch.nn.functional.pad(LABELS_RIGHT[:, 1:], (0, 1), value=IGNORED)
    expected = {"only": ["cpp...", "p....."]}
    for more in ({}, {"labels": LABELS_RIGHT}):
        assert found(llama, input_ids=IDS, attention_mask=RIGHT, shift_labels=shifted, **more) == expected


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders(family: str) -> None:
    model = build(family)
    labels = rows([5, 6, 7, -100], [5, 6, -100, -100])
    decoder = ["ppp.", "pp.."]
    assert found(model, input_ids=IDS, attention_mask=RIGHT, labels=labels) == {
        "encoder": ["ccccc.", "ccc..."],
        "decoder": decoder,
    }
    assert found(model, input_ids=IDS, labels=labels) == {"encoder": ["cccccc"] * 2, "decoder": decoder}
    masked = found(model, input_ids=IDS, decoder_attention_mask=rows([1, 1, 1, 0], [1, 1, 0, 0]), labels=labels)
    assert masked["decoder"] == decoder
    labelled = found(model, input_ids=IDS, decoder_attention_mask=rows([1, 1, 1, 0], [1, 0, 0, 0]), labels=labels)
    assert labelled["decoder"] == ["pppc", "ppcc"]  # the loss is computed at padding, so nothing is skipped
    holes = found(model, input_ids=IDS, labels=rows([-100, 6, -100, 7], [5, -100, -100, -100]))
    assert holes["decoder"] == ["cpcp", "p..."]


def test_encoders() -> None:
    """Their tokens see all others that are not masked, so that none but these are padding."""
    model = build("bert")
    labels = rows([-100, 4, -100, -100, -100, -100], [3, -100, 5, -100, -100, -100])
    assert found(model, input_ids=IDS, attention_mask=RIGHT, labels=labels) == {"only": ["cpccc.", "pcp..."]}
    by_token = transformers.BertForTokenClassification(model.config)
    assert found(by_token, input_ids=IDS, attention_mask=RIGHT, labels=labels) == {"only": ["cpccc.", "pcp..."]}
    by_row = transformers.BertForSequenceClassification(model.config)
    for labels in (torch.tensor([0, 1]), torch.tensor([0.1, 0.2]), torch.rand(2, 3)):
        assert found(by_row, input_ids=IDS, attention_mask=RIGHT, labels=labels) == {"only": ["pcccp.", "pcp..."]}
        assert found(by_row, input_ids=IDS, attention_mask=LEFT, labels=labels) == {"only": [".pcccp", "...pcp"]}


def test_what_cannot_be_known(llama: nn.Module) -> None:
    """Has one class."""
    assert found(llama, input_ids=IDS, attention_mask=RIGHT) == {}
    assert found(llama, input_ids=IDS, labels=[{"boxes": IDS}]) == {}
    assert found(llama, input_ids=IDS, labels=LABELS_RIGHT, attention_mask={"full_attention": RIGHT}) == {}
    assert found(llama, input_ids=IDS, labels=LABELS_RIGHT, attention_mask=torch.ones(2, 9)) == {}  # with a cache
    assert found(build("vit"), pixel_values=torch.zeros(2, 3, 8, 8), labels=torch.tensor([0, 1])) == {}
    assert found(nn.Linear(2, 2), input_ids=IDS, labels=LABELS_RIGHT) == {}  # are labels shifted?


def test_which_mlps_see_the_text() -> None:
    """Those of the stack that sees it, if they see as many tokens."""
    text, audio = torch.zeros(2, 6, WIDTH), torch.zeros(2, 4, WIDTH)
    labels = rows([5, 6, 7, -100], [5, 6, -100, -100])
    both = classify(build("bart"), {"input_ids": IDS, "attention_mask": RIGHT, "labels": labels})
    assert drawn(both.of("model.encoder.layers.0", text)) == ["ccccc.", "ccc..."]
    assert drawn(both.of("model.decoder.layers.0", audio)) == ["ppp.", "pp.."]
    assert both.of("model.decoder.layers.0", text) is both.of("model.encoder.layers.0", audio) is None
    speech = classify(build("whisper"), {"input_features": torch.zeros(2, 80, 8), "labels": labels})
    assert speech.of("model.encoder.layers.0", audio) is None  # as many frames as labels
    assert speech.of("model.decoder.layers.0", audio) is not None
    masked = {"input_ids": IDS, "attention_mask": RIGHT, "labels": LABELS_RIGHT}
    one = classify(build("bert"), masked)
    assert one.of("bert.encoder.layer.0", text) is one.of("bert.encoder.layer.0", text.flatten(0, 1)) is not None
    one = classify(build("llama"), masked)
    assert one.of("model.layers.0.mlp", text) is not None
    for name in ("model.visual.blocks.0.mlp", "vision_tower.layers.0.mlp", "model.layers.0.mlp.experts.3"):
        assert one.of(name, text.flatten(0, 1)) is None


def test_decoders_of_vision_language_models_predict_the_next_token() -> None:
    config = transformers.LlavaConfig(
        text_config=build("llama").config.to_dict(), image_token_index=9,
        vision_config=dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                           image_size=8, patch_size=4),
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    labels = rows([-100, -100, -100, 6, 7, -100])
    assert found(model, input_ids=IDS[:1], labels=labels) == {"only": ["ccpp.."]}
