"""Are the gathered products and all their gradients right, in every dtype, and what do they keep for backward?"""

import itertools
import threading

import pytest
import torch
from helpers.mlps import KINDS, Kind, force, leaves_of, patched, reference
from helpers.reference import mask_of
from torch import Tensor

D, M = 5, 11

# (tokens, tile size, k): spare slots, one token, fewer tokens than a tile, one neuron, all neurons.
SHAPES = [(7, 2, 4), (15, 4, 3), (1, 4, 3), (3, 8, 5), (7, 2, 1), (7, 2, M), (8, 2, 6)]


def factors(mlp) -> list[Tensor]:
    return [factor for p in mlp.projections for factor in (p.update.U, p.update.V)]


def assert_gradients(mlp, leaves: list[tuple[Tensor, Tensor]]) -> None:
    """Of every U and V: those of the plain leaves."""
    for found, wanted in zip(factors(mlp), itertools.chain(*leaves), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-12, atol=1e-12)
        assert wanted.grad.any()


def tokens(count: int, d: int = D) -> Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# By default the first shape with every kind, and every other shape with one.
GRADCHECKED = {(kind, SHAPES[0]) for kind in KINDS} | set(zip(itertools.cycle(KINDS), SHAPES[1:], strict=False))


@pytest.mark.parametrize(
    ("kind", "bias", "shape"),
    [
        pytest.param(*case, marks=[] if case[::2] in GRADCHECKED and not case[1] else pytest.mark.slow)
        for case in itertools.product(KINDS, (True, False), SHAPES)
    ],
    ids=str,
)
def test_gradcheck(kind: Kind, bias: bool, shape: tuple[int, int, int]) -> None:
    """Numerical against analytical derivatives with respect to x and every U and V."""
    count, tile, k = shape
    module, mlp, _ = patched(kind, D, M, bias)
    selection = force(mlp, count, k, tile)
    if shape in ((7, 2, 4), (15, 4, 3)):
        assert len(selection.tiles.spare)
    x = tokens(count).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *factors(mlp)))
    assert mlp.calls > 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_masked_dense_computation(kind: Kind, shape: tuple[int, int, int]) -> None:
    count, tile, k = shape
    module, mlp, twin = patched(kind, D, M)
    mask = mask_of(force(mlp, count, k, tile), M, torch.float64)
    x, y = tokens(count).requires_grad_(), tokens(count).requires_grad_()
    leaves = leaves_of(mlp, torch.float64)
    got, expected = module(x), reference(twin, mlp, y, mask, leaves)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(got.shape, dtype=got.dtype)
    got.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
    assert_gradients(mlp, leaves)
    if k < M:
        mask[0] = 1
        assert (reference(twin, mlp, y, mask, leaves) - got).abs().max() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_batch_shape_is_restored(kind: Kind) -> None:
    module, mlp, _ = patched(kind, D, M)
    force(mlp, 12, 4, 4)
    x = tokens(12)
    flat = module(x)
    assert torch.equal(module(x.view(2, 3, 2, D)), flat.view(2, 3, 2, D))
    assert torch.equal(module(x.view(3, 4, D).transpose(0, 1).contiguous().transpose(0, 1)), flat.view(3, 4, D))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_without_gradient(kind: Kind) -> None:
    module, mlp, _ = patched(kind, D, M)
    force(mlp, 7, 4, 2)
    module(tokens(7)).sum().backward()
    with_leaf = [factor.grad.clone() for factor in factors(mlp)]
    module.zero_grad()
    module(tokens(7).requires_grad_()).sum().backward()
    assert all(torch.equal(a, factor.grad) for a, factor in zip(with_leaf, factors(mlp), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_upstream_gradient_with_strange_strides(kind: Kind) -> None:
    """sum() hands down an expanded scalar, slicing a strided one."""
    module, mlp, twin = patched(kind, D, M)
    mask = mask_of(force(mlp, 7, 4, 2), M, torch.float64)
    leaves = leaves_of(mlp, torch.float64)
    (module(tokens(7))[:, ::2].sum() * 2).backward()
    (reference(twin, mlp, tokens(7), mask, leaves)[:, ::2].sum() * 2).backward()
    assert_gradients(mlp, leaves)


def errors(kind: Kind, dtype: torch.dtype, sparse: bool, autocast: bool) -> dict[str, float]:
    """Relative Frobenius errors of outputs and gradients in `dtype`, against float64 on the same values."""
    d, m, count, k, tile = 48, 160, 50, 40, 12
    weights = torch.float32 if autocast else dtype
    module, mlp, twin = patched(kind, d, m, dtype=weights)
    with torch.no_grad():  # the same, representable values on all sides: only the arithmetic differs
        for value in [*module.parameters(), *twin.parameters()]:
            value.copy_(value.to(dtype))
    mask = mask_of(force(mlp, count, k, tile), m, torch.float64)
    x = tokens(count, d).to(dtype)
    upstream = torch.randn(count, d, generator=torch.Generator().manual_seed(2)).to(dtype)

    exact = leaves_of(mlp, torch.float64)
    x_exact = x.double().requires_grad_()
    truth = reference(twin.double(), mlp, x_exact, mask, exact)
    truth.backward(upstream.double())

    x = x.to(weights).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast):
        if sparse:
            leaves = [(p.update.U, p.update.V) for p in mlp.projections]
            got = module(x)
        else:
            leaves = leaves_of(mlp, torch.float32)
            got = reference(twin.to(weights), mlp, x, mask, leaves)
    assert got.dtype == dtype
    got.backward(upstream.to(got.dtype))
    assert all(factor.grad.dtype == torch.float32 for pair in leaves for factor in pair)
    found = {"y": got, "x": x.grad}
    wanted = {"y": truth, "x": x_exact.grad}
    for i, (pair, exact_pair) in enumerate(zip(leaves, exact, strict=True)):
        for name, factor, exact_factor in zip("UV", pair, exact_pair, strict=True):
            found[f"{name}{i}"], wanted[f"{name}{i}"] = factor.grad, exact_factor.grad
    return {n: ((found[n].double() - wanted[n]).norm() / wanted[n].norm()).item() for n in found}


@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_error_is_at_most_three_times_the_stock_one(
    kind: Kind, dtype: torch.dtype, autocast: bool
) -> None:
    ours, stock = errors(kind, dtype, True, autocast), errors(kind, dtype, False, autocast)
    assert ours.keys() == stock.keys() and len(ours) >= 6
    for name, error in ours.items():
        assert error <= 3 * stock[name], (name, error, stock[name])
        assert 0 < error < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_computes_in_its_dtype_and_keeps_float32_factors(kind: Kind) -> None:
    module, mlp, _ = patched(kind, D, M, dtype=torch.float32)
    force(mlp, 7, 4, 2)
    seen = []
    handle = mlp.output.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    x = tokens(7).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    y.float().sum().backward()
    handle.remove()
    assert (seen, y.dtype, x.grad.dtype) == ([torch.bfloat16], torch.bfloat16, torch.float32)
    assert all(factor.dtype == factor.grad.dtype == torch.float32 for factor in factors(mlp))
    assert all(p.weight.dtype == torch.float32 for p in mlp.projections)


def test_autocast_leaves_float64_alone() -> None:
    """As stock linear layers do."""
    module, mlp, _ = patched("plain", D, M)
    force(mlp, 7, 4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(tokens(7)).dtype == torch.float64


def test_autocast_sees_weights_that_change() -> None:
    """The rows cast for autocast are kept between calls, not beyond a change of the weight."""
    module, mlp, _ = patched("plain", D, M, dtype=torch.float32)
    force(mlp, 7, 4, 2)
    x = tokens(7).float()
    with torch.autocast("cpu", torch.bfloat16):
        before = module(x)
        with torch.no_grad():
            mlp.output.weight.mul_(2)
        after = module(x)
    assert (after - before).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_only_compact_activations_are_kept_for_backward(kind: Kind) -> None:
    d, m, count, k = 8, 2048, 64, 64
    module, mlp, twin = patched(kind, d, m, dtype=torch.float32)
    force(mlp, count, k, 16)
    x = tokens(count, d).float().requires_grad_()
    copies = [projection.rows(contiguous=True) for projection in mlp.projections]  # kept with the weights
    weights = {p.untyped_storage().data_ptr() for p in [*module.parameters(), *twin.parameters(), x, *copies]}

    def kept(run) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = run(x)
        assert output.requires_grad
        return sum(sizes.values())

    dense = kept(twin)
    sparse = kept(module)
    # At most gate, up, activation and product, all [N, k], and what depends on d and the rank.
    assert 0 < sparse <= 4 * (5 * count * k + 4 * count * d)
    assert dense >= 4 * count * m
    assert sparse * 10 < dense


@pytest.mark.parametrize("kind", KINDS)
def test_base_weights_and_biases_get_no_gradient(kind: Kind) -> None:
    module, mlp, _ = patched(kind, D, M)
    force(mlp, 7, 4, 2)
    module(tokens(7).requires_grad_()).sum().backward()
    assert all(p.weight.grad is None and p.bias.grad is None for p in mlp.projections)


def test_unused_neurons_get_no_update() -> None:
    module, mlp, _ = patched("plain", D, M)
    selection = force(mlp, 7, 4, 2)
    module(tokens(7)).square().sum().backward()
    used = torch.zeros(M, dtype=torch.bool).scatter_(0, selection.neurons.flatten(), True)
    assert not used.all()
    for projection in mlp.projections:
        assert projection.update.U.grad[used].any(1).all()
        assert not projection.update.U.grad[~used].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_nan_leaves_nothing_behind(kind: Kind, dtype: torch.dtype) -> None:
    """Memory that is used again must not carry values over: some GEMMs read beyond the rows they were given."""
    d, m, count, k, tile = 47, 160, 50, 41, 12
    module, mlp, _ = patched(kind, d, m, dtype=dtype)
    force(mlp, count, k, tile)
    x = tokens(count, d).to(dtype).requires_grad_()
    results = []
    for _ in range(2):
        module.zero_grad()
        x.grad = None
        y = module(x)
        (0.05 * y.float()).square().sum().backward()  # within the range of float16
        results.append([y.detach(), x.grad.clone(), *(factor.grad.clone() for factor in factors(mlp))])
        spoiled = torch.full_like(x, float("nan")).requires_grad_()
        module(spoiled).sum().backward()
    for before, after in zip(*results, strict=True):
        assert before.isfinite().all()
        assert torch.equal(before, after)


def test_training_after_inference_mode() -> None:
    """In a thread of its own, whose first sparse pass is one without gradients."""
    module, mlp, _ = patched("gated", D, M)
    force(mlp, 7, 4, 2)
    outcome: list[object] = []

    def work() -> None:
        try:
            with torch.inference_mode():
                module(tokens(7))
            module(tokens(7).requires_grad_()).sum().backward()
            outcome.append(mlp.inputs[0].update.U.grad)
        except RuntimeError as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(outcome[0], torch.Tensor) and outcome[0].any()


def test_threads_do_not_disturb_each_other() -> None:
    """Two models in two threads, as in data loading or serving beside training."""
    made = [patched("plain", 16 + 3 * i, 64, dtype=torch.float32) for i in range(2)]
    for _, mlp, _ in made:
        force(mlp, 40, 20, 8)
    inputs = [tokens(40, 16 + 3 * i).float() for i in range(2)]
    expected = [module(x) for (module, _, _), x in zip(made, inputs, strict=True)]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            if not torch.equal(made[number][0](inputs[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
