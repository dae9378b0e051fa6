"""Do `generate` and `pipeline` give with the live model what they give with the model that it saves?"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import CONFIG, LAYERS, NEURONS, WIDTH, build, fill_updates, tokens
from helpers.trl_runs import demo_tokenizer, llama_for
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerBase, pipeline

from hf_subquad import patch_model, sparse_forward, sparse_mlps


def live_and_saved(model: nn.Module, folder: Path) -> tuple[nn.Module, nn.Module]:
    """The patched model, its updates as if trained, and the plain model that its checkpoint holds."""
    patch_model(model, CONFIG)
    fill_updates(model)
    model.save_pretrained(folder)
    return model.eval(), type(model).from_pretrained(folder).eval()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    loaded = demo_tokenizer()
    loaded.add_special_tokens({"mask_token": "<mask>"})
    return loaded


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "no cache": {"do_sample": False, "use_cache": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20},
}


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "gpt_neox", "t5"])
def test_every_way_of_generation_padded_to_the_left(family: str, tmp_path: Path) -> None:
    live, saved = live_and_saved(build(family), tmp_path)
    ids, mask = tokens(9, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 2, 0
    for name, way in WAYS.items():
        found = []
        for model in (live, saved):
            torch.manual_seed(4)
            found.append(
                model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, pad_token_id=2,
                               repetition_penalty=5.0, **way)
            )  # fmt: skip
        assert torch.equal(*found), name
        assert len(set(found[0][:, -6:].flatten().tolist())) > 3
    assert not any(mlp.calls for mlp in sparse_mlps(live))


def test_text_generation(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    live, saved = live_and_saved(llama_for(tokenizer), tmp_path)
    texts = []
    for model in (live, saved):
        generate = pipeline("text-generation", model=model, tokenizer=copy.deepcopy(tokenizer))
        texts.append(generate(["def f(", "class"], max_new_tokens=5, do_sample=False, batch_size=2))
    assert texts[0] == texts[1]
    with sparse_forward(live):
        generate = pipeline("text-generation", model=live, tokenizer=tokenizer)
        assert generate("def f(", max_new_tokens=5, do_sample=False)[0]["generated_text"].startswith("def f(")
    assert all(mlp.calls >= 5 for mlp in sparse_mlps(live))


def test_filling_a_mask(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = build("bert", vocab_size=len(tokenizer), max_position_embeddings=64)
    answers = [
        pipeline("fill-mask", model=m, tokenizer=tokenizer)("a <mask> b") for m in live_and_saved(model, tmp_path)
    ]
    assert [answer["token"] for answer in answers[0]] == [answer["token"] for answer in answers[1]]


def test_text_classification(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_labels=7,
    )  # fmt: skip
    live, saved = live_and_saved(BertForSequenceClassification(config), tmp_path)
    found, expected = (
        pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)(["def f()", "class"])
        for model in (live, saved)
    )
    scores = [[{answer["label"]: answer["score"] for answer in row} for row in rows] for rows in (found, expected)]
    assert all(row == pytest.approx(other, rel=1e-5) for row, other in zip(*scores, strict=True))
    assert all(max(row.values()) - min(row.values()) > 1e-3 for row in scores[0])
