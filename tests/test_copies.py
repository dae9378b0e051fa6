"""Do copies, pickles, moves between modes and forwards without gradients behave as for any model?"""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from helpers.models import CONFIG, FAMILIES, WIDTH, batch, llama, logits, objective, opt, tokens, trained
from helpers.training import trainer
from torch import Tensor, nn

from hf_subquad import (
    NotPatchedError,
    dense_forward,
    patch_model,
    sparse_forward,
    sparse_mlps,
    unpatch_model,
)


def through_torch(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


COPIES = {"deepcopy": copy.deepcopy, "torch": through_torch, "pickle": through_pickle}


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "bert", "phi3"])
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_is_equal_independent_and_trains(duplicate, family: str) -> None:
    model = trained(family)
    inputs = batch(family, model)
    sparse, dense = logits(model, inputs), logits(model.eval(), inputs)
    model.train()
    twin = duplicate(model)
    assert torch.equal(logits(twin, inputs), sparse)
    assert torch.equal(logits(twin.eval(), inputs), dense)
    twin.train()
    mine, theirs = sparse_mlps(model), sparse_mlps(twin)
    assert len(mine) == len(theirs)
    assert not {id(m) for m in mine} & {id(m) for m in theirs}
    assert mine[0].runtime is not theirs[0].runtime and len({id(m.runtime) for m in theirs}) == 1
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in pointers for p in twin.parameters())
    for mlp in theirs:
        assert all(p.mlp is mlp for p in mlp.projections)
        assert mlp.parent is twin.get_submodule(mlp.name)
        assert all(mlp.index.inputs[i] is p for i, p in enumerate(mlp.inputs))

    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2)
    objective(logits(twin, inputs)).backward()
    optimizer.step()
    assert (logits(twin, inputs) - sparse).abs().max() > 1e-3
    assert torch.equal(logits(model, inputs), sparse)
    assert all(mlp.inputs[0].update.U.grad is None for mlp in mine)
    with dense_forward(twin):
        assert model.training and torch.equal(logits(model, inputs), sparse)
    assert type(unpatch_model(twin).get_submodule(mine[0].name)) is type(mine[0].parent)
    assert not sparse_mlps(twin) and len(sparse_mlps(model)) == len(mine)


def test_a_copied_optimizer_state_is_not_needed(tmp_path: Path) -> None:
    """A deepcopy goes through the Trainer as the original does."""
    model = copy.deepcopy(trained())
    before = model.get_parameter("model.decoder.layers.1.fc1.update.U").clone()
    trainer(model, tmp_path, max_steps=1).train()
    assert not torch.equal(before, model.get_parameter("model.decoder.layers.1.fc1.update.U"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_sparse_forward_without_gradients(family: str, context) -> None:
    model = trained(family)
    inputs = batch(family, model)
    expected = logits(model, inputs)

    def same(found: Tensor, wanted: Tensor) -> bool:  # attention takes other kernels without gradients
        return torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)

    with context():
        with sparse_forward(model):
            assert same(logits(model, inputs), expected)
        model.eval()
        dense = logits(model, inputs)
        assert (dense - expected).abs().max() > 1e-3
        with sparse_forward(model):
            assert same(logits(model, inputs), expected)
            with dense_forward(model):
                assert same(logits(model, inputs), dense)
            assert same(logits(model, inputs), expected)
        assert same(logits(model, inputs), dense)


def test_forced_forwards_are_undone_after_an_error() -> None:
    model = trained()
    with pytest.raises(KeyError), dense_forward(model):
        raise KeyError
    before = sparse_mlps(model)[0].calls
    model(tokens())
    assert sparse_mlps(model)[0].calls == before + 1


@pytest.mark.parametrize("manager", [dense_forward, sparse_forward])
def test_forced_forwards_need_a_patch(manager) -> None:
    with pytest.raises(NotPatchedError), manager(opt()):
        pass
    with pytest.raises(NotPatchedError):
        unpatch_model(opt())


@pytest.mark.parametrize("make", [opt, llama])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_an_mlp_that_gets_no_tokens_trains_nothing(make, shape: tuple[int, int]) -> None:
    """The model may have routed them elsewhere."""
    mlp = sparse_mlps(patch_model(make(), CONFIG))[0]
    x = torch.zeros(*shape, WIDTH, requires_grad=True)
    y = mlp.parent.fc2(mlp.parent.fc1(x)) if make is opt else mlp.parent(x)
    y.sum().backward()
    assert y.shape == x.shape and x.grad.shape == x.shape and not mlp.calls
    factors = [factor for projection in mlp.projections for factor in projection.update.parameters()]
    assert all(factor.grad is not None and not factor.grad.any() for factor in factors)  # DDP waits for each


def test_error_between_the_projections_leaves_nothing_behind() -> None:
    model = trained("llama")
    expected = model(tokens()).logits
    mlp = sparse_mlps(model)[0]
    handle = mlp.output.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens(1, (2, 3)))
    handle.remove()
    assert torch.equal(model(tokens()).logits, expected)
    model.eval()
    model(tokens(1, (2, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_cast_after_the_patch_still_trains(dtype: torch.dtype) -> None:
    model = trained().to(dtype)
    loss = objective(model(tokens()).logits)
    loss.backward()
    for mlp in sparse_mlps(model):
        for p in mlp.projections:
            assert p.weight.dtype == dtype
            assert p.update.U.dtype == p.update.U.grad.dtype == torch.promote_types(dtype, torch.float32)
    assert unpatch_model(model).get_parameter("model.decoder.layers.1.fc1.weight").dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model_trains(dtype: torch.dtype) -> None:
    model = patch_model(opt(dtype), CONFIG)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad and p.dtype == torch.float32], lr=1e-2
    )
    assert len(optimizer.param_groups[0]["params"]) == 8
    values: list[Tensor] = []
    for _ in range(12):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    assert values[-1] < values[0] - 0.05
