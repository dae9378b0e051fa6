"""Are gradients the same with gradient checkpointing, which runs every layer's forward twice?"""

import math

import pytest
import torch
from helpers.models import CONFIG, batch, build, checkpoint_activations, fill_updates, leaf, logits, objective, trained
from helpers.reference import recorded_selections
from torch import Tensor, nn

from hf_subquad import patch_model, sparse_mlps

FAMILIES = ("opt", "llama", "gpt2", "t5_gated", "bert", "phi3")


def gradients(model: nn.Module, family: str) -> dict[str, Tensor]:
    inputs = batch(family, model)
    model.zero_grad()
    objective(logits(model, inputs)).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {**found, "inputs": leaf(inputs).grad.clone()}


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_without(family: str, reentrant: bool) -> None:
    model = trained(family, torch.float64, active=0.2)
    expected = gradients(model, family)
    calls = [mlp.calls for mlp in sparse_mlps(model)]
    checkpoint_activations(model, reentrant)
    with recorded_selections() as selections:
        found = gradients(model, family)
    mlps = sparse_mlps(model)
    assert all(mlp.calls == 3 * before for mlp, before in zip(mlps, calls, strict=True))  # it did run twice
    assert len(selections) == 2 * len(mlps)
    assert found.keys() == expected.keys()
    assert sum(".update." in name for name in found) >= 4 * len(mlps)
    for name, value in found.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10 * scale, msg=lambda m, n=name: f"{n}: {m}")


def test_another_selection_in_the_recompute_would_show() -> None:
    """The check above can fail: neurons changed between forward and backward give other gradients."""
    model = trained()
    expected = gradients(model, "opt")
    checkpoint_activations(model, True)
    inputs = batch("opt", model)
    model.zero_grad()
    loss = objective(logits(model, inputs))
    for mlp in sparse_mlps(model):
        mlp.index.output_norms = mlp.index.output_norms.flip(0)
    loss.backward()
    name = "model.decoder.layers.1.fc1.update.V"
    assert (model.get_parameter(name).grad - expected[name]).abs().max() > 1e-3


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_spoiled_batch_with_padding_runs_through(reentrant: bool) -> None:
    """It is recognised among the passes of a step, so that its layers are computed again as the first time."""
    model = trained("llama")
    ids, mask, labels = torch.randint(50, (4, 9)), torch.ones(4, 9, dtype=torch.long), torch.full((4, 9), -100)
    mask[1:, 6:] = 0
    labels[:, 3:6] = ids[:, 3:6]
    checkpoint_activations(model, reentrant)
    for weight in (1.0, math.nan):
        embedded = (model.get_input_embeddings()(ids).detach() * weight).requires_grad_()
        model.zero_grad()
        loss = model(inputs_embeds=embedded, attention_mask=mask, labels=labels).loss
        loss.backward()
        assert loss.isfinite() == math.isfinite(weight)
        assert all(parameter.grad is not None for name, parameter in model.named_parameters() if ".update." in name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_values_beyond_float32_run_through(reentrant: bool) -> None:
    model = trained("llama", torch.float64)
    checkpoint_activations(model, reentrant)
    model.model.layers[-1].post_attention_layernorm.weight.data.fill_(1e200)
    ids = torch.randint(50, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_dense_pass_right_after(reentrant: bool) -> None:
    """Recomputation may stop early; what it leaves behind must not reach the next forward."""
    model = trained("llama")
    inputs = batch("llama", model)
    model.eval()
    expected = logits(model, inputs)
    model.train()
    sparse = logits(model, inputs)
    checkpoint_activations(model, reentrant)
    objective(logits(model, inputs)).backward()
    model.eval()
    assert torch.equal(logits(model, inputs), expected)
    model.train()
    torch.testing.assert_close(logits(model, inputs), sparse)


def test_with_autocast_and_dropout() -> None:
    model = patch_model(build("opt", dropout=0.3, activation_dropout=0.3), CONFIG)
    fill_updates(model)
    found = []
    for enabled in (False, True):
        if enabled:
            checkpoint_activations(model, False)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(model, "opt"))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6)
