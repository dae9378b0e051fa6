"""Does what stands in for skipped neurons fit them, flow gradients, and stay out of the dense model?"""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from helpers.mlps import KINDS, Kind, force, leaves_of, patched, reference
from helpers.models import CONFIG, WIDTH, batch, llama, logits, opt, tokens, trained
from helpers.planning import text_batches
from helpers.reference import mask_of
from torch import Tensor, nn

from hf_subquad import (
    CalibrationError,
    NotPatchedError,
    compensate,
    dense_forward,
    patch_model,
    sparse_forward,
    sparse_mlps,
    unpatch_model,
)
from hf_subquad.layers.budget import Budget
from hf_subquad.layers.compensation import _TOKEN_RIDGE, Compensation, CompensationFit
from hf_subquad.layers.sparse_mlp import SparseMLP
from hf_subquad.training.budget_control import audit

D, M, R, OUT, N = 12, 40, 5, 7, 300


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthogonal(rows: int = R, width: int = D) -> Tensor:
    return torch.linalg.qr(noise(width, rows, seed=1)).Q.t().contiguous()


def random_compensation(basis: Tensor, out: int) -> Compensation:
    return Compensation(basis, noise(out, len(basis), seed=2), noise(out, seed=3))


def fitted(basis: Tensor, *parts: tuple[Tensor, Tensor], whole: bool = False) -> Compensation:
    fit = CompensationFit(basis, whole)
    for x, missed in parts:
        fit.add(x, missed)
    return fit.solve()


def fitted_whole(basis: Tensor, *parts: tuple[Tensor, Tensor]) -> Compensation:
    return fitted(basis, *parts, whole=True)


# The fit by itself


def test_a_linear_map_is_found() -> None:
    """Up to the ridge, a thousandth."""
    basis = orthogonal()
    true = random_compensation(basis, OUT)
    x = noise(N, D, seed=4)
    found = fitted(basis, (x, true(x)))
    torch.testing.assert_close(found.weight, true.weight, rtol=0.02, atol=0.02)
    torch.testing.assert_close(found.bias, true.bias, rtol=0.02, atol=0.02)
    fresh = noise(N, D, seed=5)
    assert (found(fresh) - true(fresh)).norm() < 0.01 * true(fresh).norm()


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_small_features_are_fitted_beside_large_ones(scale: float) -> None:
    """Tokens of pretrained models have a few huge directions; what hangs on the others must not be shrunk away."""
    basis = orthogonal()
    true = random_compensation(basis, OUT)
    x = noise(N, D, seed=4) @ (torch.eye(D) + (scale - 1) * torch.outer(basis[0], basis[0]))
    missed = true(x - (x @ basis[0])[:, None] * basis[0])  # does not hang on the direction that is scaled
    found = fitted(basis, (x, missed))
    assert (found(x) - missed).norm() < 0.02 * missed.norm()


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_the_fit_does_not_hang_on_the_size_of_tokens(size: float) -> None:
    """Neither tiny ones, beside which the constant feature is large, nor huge ones, beside which it is small."""
    basis = orthogonal()
    true = random_compensation(basis, OUT)
    x = noise(N, D, seed=4)
    found = fitted(basis, (size * x, true(x)))
    assert (found(size * x) - true(x)).norm() < 0.02 * true(x).norm()


def test_several_batches_are_as_one() -> None:
    basis = orthogonal()
    x, missed = noise(N, D), noise(N, OUT, seed=6)
    whole, parts = fitted(basis, (x, missed)), fitted(basis, *zip(x.split(77), missed.split(77), strict=True))
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.bias, whole.bias, rtol=1e-4, atol=1e-5)
    last = fitted(basis, (x[-77:], missed[-77:]))
    assert (last.weight - whole.weight).norm() > 0.1 * whole.weight.norm()


def test_solving_does_not_end_the_fit() -> None:
    """What is added afterwards counts as if nothing had been solved in between."""
    basis = orthogonal()
    x, missed = noise(N, D), noise(N, OUT, seed=6)
    fit = CompensationFit(basis)
    fit.add(x[:50], missed[:50])
    fit.solve()
    fit.add(x[50:], missed[50:])
    torch.testing.assert_close(fit.solve().weight, fitted(basis, (x, missed)).weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-20, 1e15])
@pytest.mark.parametrize("equal", [False, True], ids=["tokens differ", "all tokens equal"])
@pytest.mark.parametrize("whole", [False, True], ids=["sketch", "whole tokens"])
def test_tokens_of_any_size_give_finite_fits(size: float, equal: bool, whole: bool) -> None:
    x = size * (noise(1, D).expand(N, D) if equal else noise(N, D))
    found = fitted(orthogonal(), (x, noise(N, OUT, seed=6)), whole=whole)
    assert all(part.isfinite().all() for part in vars(found).values())


@pytest.mark.parametrize(("size", "missed"), [(1e20, 1.0), (1.0, 3e38)])
def test_what_leaves_float32_is_an_error(size: float, missed: float) -> None:
    with pytest.raises(CalibrationError, match="too large"):
        fitted(orthogonal(), (size * noise(N, D), missed * noise(N, OUT, seed=6)))


def test_fewer_tokens_than_directions() -> None:
    found = fitted(orthogonal(), (noise(2, D), noise(2, OUT, seed=6)))
    assert found.weight.isfinite().all() and found.bias.isfinite().all()


def test_nothing_missed_is_nothing() -> None:
    found = fitted(orthogonal(), (noise(N, D), torch.zeros(N, OUT)))
    assert not found.weight.any() and not found.bias.any()


def test_a_map_of_high_rank_is_reduced_to_what_explains_the_most() -> None:
    """About as good as the best map of that rank, which is a truncated SVD of what was missed."""
    width, count = 300, 9000
    x = noise(count, width, seed=7)
    mixed = x @ torch.linalg.qr(noise(width, width, seed=8)).Q
    missed = (mixed * 0.97 ** torch.arange(width)) @ orthogonal(width, width)
    found = fitted_whole(orthogonal(R, width), (x, missed))
    assert found.basis.shape[0] == found.weight.shape[1] < width
    left_out = torch.linalg.svdvals(missed)[len(found.basis) :]
    shrunk = _TOKEN_RIDGE * width / count * missed.norm()
    assert (found(x) - missed).norm() < 1.1 * left_out.norm() + shrunk < 0.2 * missed.norm()


def test_whole_tokens_explain_more_than_the_sketch() -> None:
    """Whether there are many tokens or few; with hardly any, neither explains anything."""
    x = noise(N, D)
    missed = x @ noise(D, OUT, seed=6)
    for count, left in ((N, 0.05), (30, 0.4)):
        part, whole = (fit(orthogonal(), (x[:count], missed[:count])) for fit in (fitted, fitted_whole))
        assert (whole(x) - missed).norm() < left * missed.norm()
        assert (whole(x) - missed).norm() < (part(x) - missed).norm()
    assert not fitted_whole(orthogonal(), (x[:R], missed[:R]))(x).any()


def test_tokens_that_are_all_zero_give_the_mean() -> None:
    missed = noise(N, OUT, seed=6)
    found = fitted(orthogonal(), (torch.zeros(N, D), missed))
    torch.testing.assert_close(found.bias, missed.mean(0), rtol=0.01, atol=1e-3)
    assert found.weight.isfinite().all()


def test_call_by_hand_in_any_shape_and_dtype() -> None:
    made = random_compensation(orthogonal(), OUT)
    x = noise(3, 4, D, dtype=torch.float64)
    expected = x @ made.basis.double().t() @ made.weight.double().t() + made.bias.double()
    torch.testing.assert_close(made(x), expected)
    found = made(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.1)


# In the sparse forward


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_equal_autograd_on_a_plain_reference(kind: Kind) -> None:
    """A masked dense MLP plus a linear map, by stock operations in float64."""
    module, mlp, twin = patched(kind, D, M)
    mlp.corrections["predicted"] = made = random_compensation(orthogonal(), D)
    selection = force(mlp, 21, 13, 5)
    x = noise(3, 7, D, seed=7, dtype=torch.float64).requires_grad_()
    weights = noise(3, 7, D, seed=8, dtype=torch.float64)
    found = module(x)
    (found * weights).sum().backward()

    leaves, plain_x = leaves_of(mlp, torch.float64), x.detach().clone().requires_grad_()
    flat = plain_x.view(-1, D)
    expected = reference(twin, mlp, flat, mask_of(selection, M, torch.float64), leaves)
    expected = expected + flat @ made.basis.double().t() @ made.weight.double().t() + made.bias.double()
    (expected.view(3, 7, D) * weights).sum().backward()
    torch.testing.assert_close(found, expected.view(3, 7, D))
    torch.testing.assert_close(x.grad, plain_x.grad)
    for projection, pair in zip(mlp.projections, leaves, strict=True):
        torch.testing.assert_close(projection.update.U.grad, pair[0].grad)
        torch.testing.assert_close(projection.update.V.grad, pair[1].grad)
    mlp.corrections = {}
    x.grad = None
    (module(x) * weights).sum().backward()
    assert (x.grad - plain_x.grad).norm() > 0.1 * plain_x.grad.norm()


def test_outputs_are_views_of_any_width() -> None:
    """Tokens without a batch dimension too."""
    module, mlp, _ = patched("plain", D, M)
    x = noise(21, D, dtype=torch.float64)
    force(mlp, 21, 13, 5)
    bare = module(x)
    mlp.corrections["predicted"] = made = random_compensation(orthogonal(), D)
    torch.testing.assert_close(module(x), bare + made(x))


def held_out_error(module: nn.Module, x: Tensor) -> float:
    """As the watch audits: what is missing from the output, compensated, over what all neurons add."""
    mlp = sparse_mlps(module)[0]
    selection = mlp.index.select(x, mlp.k, 16, "similar")
    return audit(mlp, "predicted", x[selection.tiles.slots], selection.neurons).error


@pytest.mark.parametrize("kind", KINDS)
def test_compensate_lowers_the_error_on_held_out_tokens(kind: Kind) -> None:
    module, mlp, _ = patched(kind, D, M, dtype=torch.float32, active=8, tile_size=16)
    fresh = noise(256, D, seed=20) + 0.5
    before = held_out_error(module, fresh)
    compensate(module, [{"x": noise(256, D, seed=seed) + 0.5} for seed in (21, 22)])
    after = held_out_error(module, fresh)
    # Less is linear in a product of two projections of tokens with hardly a mean.
    assert 0.05 < after < (0.97 if mlp.index.gated else 0.9) * before

    with dense_forward(module), torch.no_grad():  # and in the real forward pass
        expected = module(fresh)
    found = module(fresh).detach()
    with mlp.using(corrections={}):
        bare = module(fresh).detach()
    assert (found - expected).norm() < 0.97 * (bare - expected).norm()


def test_compensate_equals_a_fit_by_hand() -> None:
    """Of the neurons that the fitted index skips in tiles of all batches' tokens, with live updates."""
    module, mlp, twin = patched("plain", D, M, dtype=torch.float32, active=9, tile_size=8)
    parts = [noise(40, D, seed=30), noise(3, 9, D, seed=31)]
    compensate(module, [{"x": part} for part in parts])
    leaves, x = leaves_of(mlp, torch.float32), torch.cat([part.reshape(-1, D) for part in parts])
    selection = mlp.index.select(x, 9, 8, "similar")
    whole = reference(twin, mlp, x, None, leaves)
    kept = reference(twin, mlp, x, mask_of(selection, M, torch.float32), leaves)
    order = selection.tiles.slots.flatten()
    expected = fitted(mlp.index.sketch.basis, (x[order], (whole - kept)[order].detach()))
    torch.testing.assert_close(mlp.corrections["predicted"].weight, expected.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mlp.corrections["predicted"].bias, expected.bias, rtol=1e-3, atol=1e-4)


# In models


def compensated(family: str = "opt", dtype: torch.dtype = torch.float32, **values: object) -> nn.Module:
    model = trained(family, dtype, **values)
    data = batch(family, model, seed=50)
    compensate(model, [{name: value.detach() for name, value in data.items()}])
    return model


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "t5_gated", "phi3", "vit"])
def test_every_mlp_of_a_model_is_fitted(family: str) -> None:
    model = compensated(family)
    inputs = batch(family, model)
    found = logits(model, inputs)
    for mlp in sparse_mlps(model):
        correction = mlp.corrections["predicted"]
        assert correction.weight.any() and correction.bias.any()
        mlp.corrections = {}
    assert not torch.equal(logits(model, inputs), found)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_all_neurons_leave_nothing_to_compensate(family: str) -> None:
    model = compensated(family, active=1.0)
    assert not any(mlp.corrections for mlp in sparse_mlps(model))
    inputs = batch(family, model)
    with dense_forward(model):
        expected = logits(model, inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_the_dense_model_and_its_checkpoint_do_not_hold_it(tmp_path: Path) -> None:
    model, bare = compensated(), trained()
    inputs = batch("opt", model)
    assert torch.equal(logits(model.eval(), inputs), logits(bare.eval(), inputs))
    assert list(model.state_dict()) == list(opt().state_dict())
    assert all(torch.equal(value, bare.state_dict()[name]) for name, value in model.state_dict().items())
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in bare.named_parameters()}
    model.save_pretrained(tmp_path)
    plain = type(opt()).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(plain, inputs), logits(bare, inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(unpatch_model(model), inputs), logits(bare, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_it(duplicate) -> None:
    model = compensated("llama")
    inputs = batch("llama", model)
    twin = duplicate(model)
    assert torch.equal(logits(twin, inputs), logits(model, inputs))
    for mine, theirs in zip(sparse_mlps(model), sparse_mlps(twin), strict=True):
        theirs.corrections["predicted"].weight.zero_()
        assert mine.corrections["predicted"].weight.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind: Kind, dtype: torch.dtype) -> None:
    """Fitted in float32, applied in the dtype of the model."""
    module, mlp, twin = patched(kind, D, M, dtype=dtype, active=9, tile_size=8)
    x = noise(N, D, seed=30).to(dtype)
    compensate(module, [{"x": x}])
    assert {value.dtype for value in vars(mlp.corrections["predicted"]).values()} == {torch.float32}
    selection = force(mlp, N, 9, 8)
    found = module(x.requires_grad_())
    assert found.dtype == dtype
    exact = reference(twin, mlp, x.double(), mask_of(selection, M, torch.float64), leaves_of(mlp, torch.float64))
    exact = exact + mlp.corrections["predicted"](x.double())
    torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0.05)
    found.float().square().mean().backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()


def test_under_autocast() -> None:
    model = compensated()
    inputs = batch("opt", model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(model, inputs)
    expected = logits(model, inputs)
    assert (found.float() - expected).norm() < 0.2 * expected.norm()


def test_only_sparse_mlps_are_fitted() -> None:
    model = patch_model(opt(), CONFIG)
    first, second = sparse_mlps(model)
    first.set_budget(Budget())
    sketches = first.index.sketch, second.index.sketch
    compensate(model, text_batches(0))
    assert not first.corrections and set(second.corrections) == {"predicted"}
    assert first.index.sketch is sketches[0] and second.index.sketch is not sketches[1]


def test_compensate_leaves_all_else_alone() -> None:
    """Mode, random states, gradients, budgets, and the way the model runs."""
    model = patch_model(opt(dropout=0.5), CONFIG)
    model.model.decoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    values = {name: value.clone() for name, value in model.named_parameters()}
    state, budgets = torch.get_rng_state(), [mlp.budget for mlp in sparse_mlps(model)]
    compensate(model, text_batches(0, 1))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(values[n], p) and p.grad is None for n, p in model.named_parameters())
    assert [mlp.budget for mlp in sparse_mlps(model)] == budgets
    assert sparse_mlps(model)[0].runtime.forward == "auto"
    assert not any(p._forward_pre_hooks for mlp in sparse_mlps(model) for p in mlp.projections)


def test_batches_can_be_iterated_once_only() -> None:
    model, other = patch_model(opt(), CONFIG), patch_model(opt(), CONFIG)
    compensate(model, iter(text_batches(0, 1)))
    compensate(other, text_batches(0, 1))
    for mine, theirs in zip(sparse_mlps(model), sparse_mlps(other), strict=True):
        assert torch.equal(mine.corrections["predicted"].weight, theirs.corrections["predicted"].weight)


def test_errors_leave_what_was_fitted() -> None:
    model = compensated()
    before = [(mlp.corrections["predicted"], mlp.index.sketch, mlp.index.summary) for mlp in sparse_mlps(model)]
    spoiled = {"inputs_embeds": batch("opt", model)["inputs_embeds"].detach().clone()}
    spoiled["inputs_embeds"][1, 2, 3] = float("nan")
    with pytest.raises(CalibrationError, match=r"layers\.1.*NaN"):
        compensate(model, [text_batches(0)[0], spoiled])
    with pytest.raises(CalibrationError, match="at least one batch"):
        compensate(model, [])
    with torch.no_grad():  # the last MLP's output leaves float32, the first one was solved by then
        sparse_mlps(model)[1].output.update.U.fill_(3e38)
    with pytest.raises(CalibrationError, match="too large"):
        compensate(model, text_batches(0, 1))
    after = [(mlp.corrections["predicted"], mlp.index.sketch, mlp.index.summary) for mlp in sparse_mlps(model)]
    assert all(a is b for ones, others in zip(before, after, strict=True) for a, b in zip(ones, others, strict=True))
    assert model.training
    with pytest.raises(NotPatchedError):
        compensate(llama(), text_batches(0))


def test_a_shared_mlp_is_fitted_to_all_its_calls() -> None:
    """A layer that the model runs twice."""
    module, mlp, _ = patched("plain", D, M, dtype=torch.float32, active=9)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = module

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(self.mlp(x))

    x = noise(64, D, seed=40)
    with dense_forward(module), torch.no_grad():
        between = module(x)
    compensate(Twice(), [{"x": x}])
    found = mlp.corrections["predicted"]
    compensate(module, [{"x": x}, {"x": between}])
    torch.testing.assert_close(found.weight, mlp.corrections["predicted"].weight, rtol=1e-3, atol=1e-4)


def test_sparse_evaluation_uses_it() -> None:
    model = compensated().eval()
    ids = tokens()
    with torch.no_grad(), sparse_forward(model):
        found = model(ids).logits
        for mlp in sparse_mlps(model):
            mlp.corrections = {}
        assert not torch.equal(model(ids).logits, found)


# By class


def by_class(budget: Budget, prompt: int = 3) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A causal LM with this budget for every MLP, its updates filled, compensated on rows that begin with a prompt."""
    model = trained()
    for mlp in sparse_mlps(model):
        mlp.set_budget(budget)
    data = text_batches(0, 1, shape=(6, 9), prompt=prompt)
    compensate(model, data)
    return model, data


@pytest.mark.parametrize(
    ("budget", "classes"),
    [
        (Budget(16, 8), {"predicted", "context"}),
        (Budget(16, 0), {"predicted", "context"}),
        (Budget(None, 8), {"context"}),
        (Budget(16, None), {"predicted"}),
        (Budget(16, 16), {"predicted"}),  # in the same tiles
        (Budget(None, None, 0.9), set()),
    ],
    ids=lambda value: str(value) if isinstance(value, Budget) else ",".join(sorted(value)) or "none",
)
def test_classes_that_skip_neurons_are_fitted(budget: Budget, classes: set[str]) -> None:
    model, _ = by_class(budget)
    assert [set(mlp.corrections) for mlp in sparse_mlps(model)] == [classes] * 2
    for mlp in sparse_mlps(model):
        assert all(correction.weight.any() for correction in mlp.corrections.values())


def seen_by(mlp: SparseMLP, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Input and output [N, d] of an MLP."""
    seen: list[Tensor] = []
    handles = [
        mlp.opens.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().reshape(-1, WIDTH))),
        mlp.output.register_forward_hook(lambda _, args, y: seen.append(y.detach().reshape(-1, WIDTH))),
    ]
    with sparse_forward(model):
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen[0], seen[1]


def test_without_neurons_context_gets_a_low_rank_map_of_its_tokens() -> None:
    """And the bias; predicted tokens keep all neurons. The last token of a row predicts nothing and reaches nothing."""
    model, (inputs, _) = by_class(Budget(None, 0))
    mlp = sparse_mlps(model)[0]
    x, y = seen_by(mlp, model, inputs)
    context = torch.zeros(6, 9, dtype=torch.bool)
    context[:, :2] = True  # the label in place 3 is predicted in place 2
    context = context.flatten()
    map_of = mlp.corrections["context"]
    assert len(map_of.basis) == WIDTH > CONFIG.sketch_rank
    torch.testing.assert_close(y[context], map_of(x[context]) + mlp.output.bias, rtol=1e-4, atol=1e-5)
    dense: list[Tensor] = []
    with dense_forward(model):
        handle = mlp.output.register_forward_hook(lambda _, args, out: dense.append(out.detach().reshape(-1, WIDTH)))
        model(**inputs)
        handle.remove()
    real = torch.ones(6, 9, dtype=torch.bool)
    real[:, -1] = False
    real = real.flatten()
    torch.testing.assert_close(y[real & ~context], dense[0][real & ~context], rtol=1e-4, atol=1e-5)
    bare = dense[0][context] - mlp.output.bias
    assert (y[context] - dense[0][context]).norm() < 0.9 * bare.norm()  # of what is missed without it
