"""Does `generate` work on sparse models, with caches, padding and beams?"""

import threading
from typing import Any

import pytest
import torch
from helpers.models import CONFIG, opt, tokens, trained
from helpers.planning import text_batches
from helpers.reference import recorded_selections
from torch import Tensor, nn

from hf_subquad import compensate, dense_forward, patch_model, sparse_forward, sparse_mlps
from hf_subquad.layers.budget import Budget

NEW = 6
FAMILIES = ("opt", "llama", "gpt2", "phi3", "t5")
WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 3}, "no cache": {"use_cache": False}}


def ready(family: str = "opt", **values: object) -> nn.Module:
    model = trained(family, **values)
    compensate(model, text_batches(0, 1))
    return model.eval()


def prompts(padded: bool = False) -> dict[str, Tensor]:
    ids, mask = tokens(9, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    if padded:
        for row, missing in enumerate((0, 4, 2)):
            ids[row, :missing], mask[row, :missing] = 2, 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: nn.Module, padded: bool = False, **settings: Any) -> Tensor:
    """Always `NEW` tokens a row; the same ones each time."""
    torch.manual_seed(0)
    return model.generate(
        **prompts(padded), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=settings.pop("do_sample", False),
        pad_token_id=2, repetition_penalty=5.0, **settings,  # or small random models repeat themselves
    )  # fmt: skip


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_neurons_it_is_dense_generation(family: str, way: dict[str, Any]) -> None:
    model = ready(family, active=1.0)
    with dense_forward(model):
        expected = generated(model, padded=True, **way)
    with sparse_forward(model):
        found = generated(model, padded=True, **way)
    assert not any(mlp.calls for mlp in sparse_mlps(model))  # no pass left any neuron out
    assert torch.equal(found, expected)
    assert len(set(expected[:, -NEW:].flatten().tolist())) > 3


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_sparse_generation_by_either_switch(padded: bool, way: dict[str, Any]) -> None:
    model, asked = ready(), ready(sparse_eval=True)
    with sparse_forward(model):
        found = generated(model, padded, **way)
    length = 7 + NEW
    assert found.shape == (3, length) and torch.equal(found[:, :7], prompts(padded)["input_ids"])
    assert torch.equal(generated(asked, padded, **way), found)
    assert all(mlp.calls == NEW for mlp in sparse_mlps(model))
    before = [mlp.calls for mlp in sparse_mlps(model)]
    generated(model, padded, **way)  # outside of the switch it is dense
    assert [mlp.calls for mlp in sparse_mlps(model)] == before


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_of_a_decoding_step_gets_neurons_of_its_own(family: str) -> None:
    model = ready(family, active=0.3, tile_size=24)
    with recorded_selections() as made, sparse_forward(model):
        generated(model, num_beams=2)
    per_step = len(sparse_mlps(model))
    assert len(made) >= NEW * 2
    steps = [selection for selection in made if len(selection.tiles.position) == 6]  # 3 rows of 2 beams
    assert len(steps) >= (NEW - 1) * (2 if family == "t5" else per_step)
    for selection in steps:
        assert selection.tiles.shape == (6, 1) and selection.neurons.shape == (6, 16)
        assert selection.tiles.slots.flatten().tolist() == list(range(6))
    assert any(len({tuple(row.sort().values.tolist()) for row in s.neurons}) > 3 for s in steps)
    rest = [selection for selection in made if len(selection.tiles.position) != 6]
    assert rest and all(selection.tiles.shape[1] > 1 for selection in rest)  # the prompt, in tiles


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_decoding_step_does_not_hang_on_the_company_it_keeps(family: str) -> None:
    """After the same prompt in the cache, a row's next logits are the same alone and in a batch."""
    model = ready(family, active=0.3, tile_size=24)
    ids = tokens(9, (3, 7))
    with torch.no_grad():

        def logits_of(rows: slice) -> Tensor:
            with dense_forward(model):
                cache = model(ids[rows], use_cache=True).past_key_values
            with sparse_forward(model):
                return model(tokens(3, (3, 1))[rows], past_key_values=cache).logits

        whole, alone = logits_of(slice(0, 3)), logits_of(slice(1, 2))
        torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-5)
        with dense_forward(model):
            cache = model(ids, use_cache=True).past_key_values
            assert not torch.allclose(model(tokens(3, (3, 1)), past_key_values=cache).logits, whole, atol=1e-3)


def test_sparse_generation_is_not_dense_generation() -> None:
    model = ready(active=0.1)
    with sparse_forward(model):
        found = generated(model, output_scores=True, return_dict_in_generate=True).scores[0]
    with dense_forward(model):
        expected = generated(model, output_scores=True, return_dict_in_generate=True).scores[0]
    assert not torch.allclose(found, expected, atol=1e-3)


def test_training_on_single_tokens_keeps_its_tiles() -> None:
    """Rows of one token are no decoding step there."""
    model = patch_model(opt(), CONFIG)
    with recorded_selections() as made:
        model(tokens(0, (15, 1)))
    assert all(selection.tiles.shape == (4, 4) for selection in made)


def test_sampling_and_half_precision() -> None:
    model = ready().bfloat16()
    with sparse_forward(model):
        found = generated(model, padded=True, do_sample=True)
        assert torch.equal(generated(model, padded=True, do_sample=True), found)
    assert found.shape == (3, 7 + NEW)


def test_threads_evaluate_one_model_at_a_time() -> None:
    """As a server does; in a thread that begins or ends in between, another one is in the middle of an MLP."""
    model = ready("llama")
    for mlp in sparse_mlps(model):
        mlp.set_budget(Budget(20, 0))
    asked = []
    for seed in range(4):  # each with other context
        ids = tokens(seed, (2, 7))
        asked.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(7) <= seed, -100)})
    with torch.no_grad(), sparse_forward(model):
        expected = [model(**batch).logits for batch in asked]
        found: dict[int, Tensor] = {}
        meeting = threading.Barrier(len(asked))
        activation = model.model.layers[1].mlp.act_fn
        activate = activation.forward
        activation.forward = lambda values: (meeting.wait(timeout=60), activate(values))[1]

        def answer(number: int) -> None:
            with torch.no_grad():
                found[number] = model(**asked[number]).logits

        threads = [threading.Thread(target=answer, args=(number,)) for number in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        del activation.forward
    for number, logits in enumerate(expected):
        torch.testing.assert_close(found[number], logits, rtol=1e-5, atol=1e-5)
