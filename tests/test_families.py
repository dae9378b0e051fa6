"""Is the patched model, of every family, the same model? Dense to the bit, sparse against an independent reference."""

import pytest
import torch
from helpers.models import (
    BATCH,
    CONFIG,
    ENCODER_DECODERS,
    FAMILIES,
    LAYERS,
    LENGTH,
    NEURONS,
    TOKENS,
    batch,
    build,
    fill_updates,
    leaf,
    logits,
    objective,
    trained,
)
from helpers.reference import mask_of, plain_logits, recorded_selections
from torch import Tensor, nn

from hf_subquad import SubquadConfig, dense_forward, patch_model, sparse_mlps, unpatch_model
from hf_subquad.ops.mlp_products import Part

ALL = SubquadConfig(**{**CONFIG.to_dict(), "layers_to_transform": "all"})


def stacks(family: str) -> int:
    return 2 if family in ENCODER_DECODERS else 1


def compare_gradients(patched: nn.Module, plain: nn.Module, leaves: dict[str, Tensor]) -> int:
    """All gradients of the patched model against the reference's; returns how many there were."""
    others = dict(plain.named_parameters())
    compared = 0
    for name, parameter in patched.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        expected = (leaves.get(name) if name in leaves else others[name]).grad
        if expected is None or parameter.grad is None:  # not used on these inputs, such as token embeddings
            assert (expected is None) == (parameter.grad is None), name
            continue
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        compared += 1
    assert all(value.grad is not None and value.grad.any() for value in leaves.values())
    return compared


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("config", "per_stack"), [(CONFIG, LAYERS - 1), (ALL, LAYERS)], ids=["default", "all"])
def test_patch_keeps_the_dense_model_to_the_bit(family: str, config: SubquadConfig, per_stack: int) -> None:
    original, model = build(family).eval(), build(family).eval()
    inputs = batch(family, model)
    assert patch_model(model, config) is model
    assert len(sparse_mlps(model)) == per_stack * stacks(family)
    assert torch.equal(logits(model, inputs), logits(original, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_is_the_original_one(family: str) -> None:
    before, model = build(family).state_dict(), patch_model(build(family), ALL)
    after = model.state_dict()
    assert list(after) == list(before)
    assert list(after._metadata) == list(before._metadata) or set(before._metadata) <= set(after._metadata)
    for name, value in before.items():
        assert (after[name].dtype, after[name].shape) == (value.dtype, value.shape), name
        assert after[name].is_contiguous(), name
        assert torch.equal(after[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_is_the_exact_inverse(family: str) -> None:
    model = build(family)
    names = [name for name, _ in model.named_parameters()]
    model.get_parameter(names[3]).requires_grad_(False)
    modules = {name: id(module) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad, p.stride(), p.clone()) for name, p in model.named_parameters()}
    patch_model(model, ALL)
    model(**batch(family, model)).logits.sum().backward()
    assert unpatch_model(model) is model
    assert {name: id(module) for name, module in model.named_modules()} == modules
    for name, parameter in model.named_parameters():
        identity, trainable, stride, value = parameters.pop(name)
        assert (id(parameter), parameter.requires_grad, parameter.stride()) == (identity, trainable, stride), name
        assert torch.equal(parameter, value), name
    assert not parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_projections_are_replaced(family: str) -> None:
    model = build(family)
    modules = dict(model.named_modules())
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    patch_model(model, CONFIG)
    patched = {f"{mlp.name}.{path}" for mlp in sparse_mlps(model) for path in mlp.sources}
    after = {n: m for n, m in model.named_modules() if not n.endswith(".update")}
    assert list(after) == list(modules)
    assert {name for name in modules if after[name] is not modules[name]} == patched
    for name, parameter in model.named_parameters():
        holder = name.rpartition(".")[0]
        if holder in patched:
            assert not parameter.requires_grad, name
        elif holder.endswith(".update"):
            assert parameter.requires_grad and parameter.dtype == torch.float32, name
        else:
            assert parameter.requires_grad == trainable[name], name


@pytest.mark.parametrize("family", FAMILIES)
def test_all_neurons_active_equals_dense_training(family: str) -> None:
    """active=1.0 is exact, through the code of parts: forward and all gradients equal the plain model's."""
    plain, model = build(family, torch.float64), build(family, torch.float64)
    patch_model(model, SubquadConfig(**{**ALL.to_dict(), "active": 1.0}))
    fill_updates(model)
    inputs, twin = batch(family, model), batch(family, plain)
    got = logits(model, inputs)
    assert all(mlp.budget.exact and not mlp.calls for mlp in sparse_mlps(model))
    expected, leaves = plain_logits(plain, model, twin, None)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    objective(got).backward()
    objective(expected).backward()
    torch.testing.assert_close(leaf(inputs).grad, leaf(twin).grad, rtol=1e-5, atol=1e-6)
    assert compare_gradients(model, plain, leaves) > len(leaves)


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_training_equals_a_masked_dense_model(family: str) -> None:
    plain, model = build(family, torch.float64), trained(family, torch.float64)
    inputs, twin = batch(family, model), batch(family, plain)
    with recorded_selections() as selections:
        got = logits(model, inputs)
    mlps = sparse_mlps(model)
    assert len(selections) == len(mlps)
    k = CONFIG.active_neurons(NEURONS)
    assert all(s.neurons.shape == (4, k) and s.tiles.shape == (4, 4) for s in selections)
    masks = [mask_of(s, NEURONS, torch.float64) for s in selections]
    assert all((mask.sum(1) == k).all() and len(mask) == TOKENS for mask in masks)

    expected, leaves = plain_logits(plain, model, twin, masks)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    objective(got).backward()
    objective(expected).backward()
    torch.testing.assert_close(leaf(inputs).grad, leaf(twin).grad, rtol=1e-5, atol=1e-6)
    assert compare_gradients(model, plain, leaves) > len(leaves)

    # The reference can tell: another mask, or none, is another result.
    assert (plain_logits(plain, model, twin, None)[0] - got).abs().max() > 1e-3
    masks[0][0] = 1 - masks[0][0]
    assert (plain_logits(plain, model, twin, masks)[0] - got).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_one_wrong_neuron_a_tile_changes_the_output(family: str) -> None:
    model = patch_model(build(family), CONFIG)
    inputs = batch(family, model)
    with recorded_selections() as selections:
        before = logits(model, inputs)
    mlp, selection = sparse_mlps(model)[0], selections[0]
    mlp.selection_override = [Part(None, selection.tiles.tokens, selection)]
    torch.testing.assert_close(logits(model, inputs), before)
    for chosen in selection.neurons:
        chosen[0] = next(j for j in range(NEURONS) if j not in chosen)
    assert (logits(model, inputs) - before).abs().max() > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_forward_with_updates_equals_merged_weights(family: str) -> None:
    plain, model = build(family), trained(family)
    inputs = batch(family, model)
    expected = plain_logits(plain.eval(), model.eval(), inputs, None)[0]
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    with dense_forward(model.train()):
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    unpatched = unpatch_model(model).eval()
    torch.testing.assert_close(logits(unpatched, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["t5", "t5_gated"])
def test_t5_with_its_output_projection_in_float32(family: str, half: torch.dtype) -> None:
    """How `from_pretrained(dtype=float16)` loads T5: all in half precision but `wo`."""
    model = build(family, half)
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    patch_model(model, CONFIG)
    got = logits(model, batch(family, model))
    assert got.dtype == half
    assert got.isfinite().all()
    got.float().sum().backward()
    assert all(p.update.U.grad.dtype == torch.float32 for mlp in sparse_mlps(model) for p in mlp.projections)


def test_a_layer_that_chunks_its_mlp_is_judged_by_the_modules_that_it_calls() -> None:
    """Chunks of three tokens are not what the self-test masks, so it runs the two modules one after the other."""
    model = patch_model(build("bert", chunk_size_feed_forward=3), CONFIG)
    assert all(mlp.shares_input and mlp.opens is mlp.inputs[0] for mlp in sparse_mlps(model))


def test_batch_shape_is_what_this_file_assumes() -> None:
    assert batch("opt", build("opt"))["inputs_embeds"].shape[:2] == (BATCH, LENGTH)
    assert TOKENS % 4
