"""Do all backends compute the same? Without a GPU, Triton's kernels run in its interpreter."""

import copy
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.mlps import KINDS, Kind, force, leaves_of, patched, reference
from helpers.models import CONFIG, build, opt, tokens
from helpers.reference import mask_of
from helpers.training import losses, patched_opt, trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from hf_subquad import BackendError, patch_model, sparse_mlps
from hf_subquad.layers.batch_hook import unwatch_batches
from hf_subquad.layers.budget import Budget
from hf_subquad.layers.classify_tokens import BatchClasses, TokenClasses
from hf_subquad.layers.compensation import Compensation
from hf_subquad.ops import backends as choice
from hf_subquad.ops import mlp_products
from hf_subquad.ops.backends import Backend, MergedWeight, backend_for
from hf_subquad.ops.group_tokens import TokenTiles, make_tiles

pytest.importorskip("triton", minversion="3.3")
from hf_subquad.ops.backends import triton_backend, triton_products, triton_selection, triton_tiles

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU: run -m gpu")
SLOW = pytest.mark.slow
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
N, T, D, M, RANK = 15, 8, 24, 50, 3
TIGHT = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _few_neurons(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Budgets are not rounded up, which would be to all neurons of these small MLPs."""
    if "rounded" not in request.node.name:
        monkeypatch.setattr(triton_backend, "_STEP", 1)


# Which one


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Of the CUDA device that there seems to be."""
    found = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(found))
    caches = choice._has_tensor_cores, choice._triton_installed
    for cache in caches:
        cache.cache_clear()
    yield found
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def test_choice_by_device_and_name(capability: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def name(asked: Any, device: str) -> str:
        return type(backend_for(asked, torch.device(device))).__name__

    assert [name(asked, "cuda") for asked in ("auto", "triton", "torch")] == ["TritonBackend"] * 2 + ["TorchBackend"]
    assert name("auto", "cpu") == name("torch", "cpu") == name("auto", "mps") == "TorchBackend"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert name("triton", "cpu") == "TritonBackend" and name("auto", "cpu") == "TorchBackend"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert name("triton", "cpu") == "TorchBackend"  # a model that waits to be moved
    capability[0] = 7
    assert name("auto", "cuda:1") == name("triton", "cuda:1") == "TorchBackend"  # asked anew on another device


@pytest.mark.parametrize("found", [None, "3.2.0"])
def test_without_triton(found: str | None, capability: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(choice, "version", version)
    choice._triton_installed.cache_clear()
    assert type(backend_for("auto", torch.device("cuda"))).__name__ == "TorchBackend"
    model = opt()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BackendError, match=r"3\.3 or newer"):
        patch_model(model, replace(CONFIG, backend="triton"))
    assert not sparse_mlps(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# The interface


def tiling(device: str) -> tuple[Any, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tiles = make_tiles(torch.randn(N, 6, generator=generator).to(device), T, "similar")
    assert len(tiles.spare)
    chosen = [torch.randperm(M, generator=generator)[:19].sort().values for _ in range(tiles.shape[0])]
    return tiles, torch.stack(chosen).to(device)


def merged_rows(count: int, bias: int | None, dtype: torch.dtype, device: str) -> list[MergedWeight]:
    """Matrices of M neurons; the first ones have a bias of `bias` values."""
    generator = torch.Generator().manual_seed(4)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return [
        MergedWeight(
            drawn(M, D), drawn(M, RANK).float(), drawn(RANK, D).float(), drawn(bias) if bias and not i else None
        )
        for i in range(count)
    ]


def compact_and_low(
    how: Backend, x: Tensor, tiles: TokenTiles, neurons: Tensor, into: list[MergedWeight]
) -> tuple[list[Tensor], Tensor]:
    out = [how.compact(x.new_empty(tiles.slots.numel() * neurons.shape[1]), tiles, neurons.shape[1]) for _ in into]
    return out, how.gathered_up(x, tiles, neurons, into, out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("matrices", [1, 2])
def test_products_and_their_gradients(matrices: int, dtype: torch.dtype, device: str) -> None:
    """float64 is left to PyTorch."""
    one, other = (backend_for(name, torch.device(device)) for name in ("torch", "triton"))
    tiles, neurons = tiling(device)
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    into = merged_rows(matrices, M, dtype, device)
    (expected, expected_low), (found, low) = (compact_and_low(how, x, tiles, neurons, into) for how in (one, other))
    assert low.shape == (N, matrices * RANK)
    torch.testing.assert_close([*found, low], [*expected, expected_low], **TIGHT)

    out_of = merged_rows(matrices, D, dtype, device)
    expected_y, expected_low = one.gathered_down(expected, tiles, neurons, out_of)
    y, a_low = other.gathered_down(expected, tiles, neurons, out_of)
    torch.testing.assert_close([y, a_low], [expected_y, expected_low], **TIGHT)

    gradients = [
        backend.update_gradients(expected[0], a_low[:, :RANK], x, low[:, :RANK], tiles, neurons, M)
        for backend in (one, other)
    ]
    torch.testing.assert_close(*gradients, **TIGHT)
    assert all(part.dtype == dtype for part in gradients[1])


class Odd(nn.Module):
    """An activation that no kernel knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() * x


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kind", "activation"),
    [*((kind, None) for kind in KINDS), *(pytest.param(kind, Odd(), id=f"{kind}-odd") for kind in ("plain", "gated"))],
)
def test_selection(kind: Kind, activation: nn.Module | None, device: str) -> None:
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(6)).to(device)
    selections, scores = [], []
    for backend in ("torch", "triton"):
        module, mlp, _ = patched(kind, D, M, dtype=torch.float32, activation=activation, backend=backend)
        module.to(device)
        selections.append(mlp.index.select(x, 16, T, "similar"))
        scores.append(mlp.index.tile_scores(x.view(1, N, D)[:, :16]))
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-5)
    one, other = selections
    assert torch.equal(one.tiles.slots.sort(dim=1).values, other.tiles.slots.sort(dim=1).values)
    assert torch.equal(one.neurons.sort(dim=1).values, other.neurons)
    assert torch.equal(other.neurons, other.neurons.sort(dim=1).values)


@interpreted
def test_ranks_that_no_block_holds() -> None:
    """Are left to PyTorch."""
    x = torch.randn(N, 20)
    found = []
    for backend in ("torch", "triton"):
        _, mlp, _ = patched("plain", 20, M, dtype=torch.float32, rank=20, backend=backend)
        estimate = mlp.index.sketch
        mlp.index.sketch = replace(estimate, basis=estimate.basis.repeat(40, 1), codes=estimate.codes.repeat(1, 40))
        found.append(mlp.index.select(x, 16, T, "similar").neurons)
    assert torch.equal(*(neurons.sort(dim=1).values for neurons in found))


@interpreted
def test_neurons_are_rounded_up_to_whole_steps() -> None:
    _, mlp, _ = patched("gated", D, 150, dtype=torch.float32, backend="triton")
    for wanted, computed in ((64, 64), (65, 128), (129, 150)):
        selection = mlp.index.select(torch.randn(N, D), wanted, T, "similar")
        assert selection.neurons.shape[1] == computed
        assert all(len(set(row.tolist())) == computed for row in selection.neurons)


# Whole MLPs and models


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kind", "bias"),
    [("plain", True), ("gated", False), ("stacked", True), ("conv1d", True), pytest.param("gated", True, marks=SLOW),
     pytest.param("plain", False, marks=SLOW), pytest.param("stacked", False, marks=SLOW)],
)  # fmt: skip
def test_an_mlp_equals_its_masked_dense_twin(kind: Kind, bias: bool, device: str) -> None:
    module, mlp, twin = patched(kind, D, M, bias, torch.float32, backend="triton")
    selection = force(mlp, N, 19, T)
    mask = mask_of(selection, M, torch.float64)
    leaves = leaves_of(mlp, torch.float64)
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(7))
    upstream = torch.randn(N, D, generator=torch.Generator().manual_seed(8))
    exact = x.double().requires_grad_()
    expected = reference(twin.double(), mlp, exact, mask, leaves)
    expected.backward(upstream.double())

    tiles = type(selection.tiles)(selection.tiles.entries.to(device), N)
    selection = replace(selection, tiles=tiles, neurons=selection.neurons.to(device))
    mlp.selection_override = [mlp_products.Part(None, N, selection)]
    x = x.to(device).requires_grad_()
    found = module.to(device)(x)
    found.backward(upstream.to(device))
    torch.testing.assert_close(found.double().cpu(), expected, **TIGHT)
    torch.testing.assert_close(x.grad.double().cpu(), exact.grad, **TIGHT)
    factors = [factor for p in mlp.projections for factor in (p.update.U, p.update.V)]
    for factor, leaf in zip(factors, [leaf for pair in leaves for leaf in pair], strict=True):
        torch.testing.assert_close(factor.grad.double().cpu(), leaf.grad, **TIGHT)


def gradients(family: str, backend: str, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    config = replace(CONFIG, backend=backend, active=16, layers_to_transform=[1])
    model = patch_model(build(family), config).train().to(device)
    generator = torch.Generator().manual_seed(9)
    for mlp in sparse_mlps(model):
        for projection in mlp.projections:
            for factor in projection.update.parameters():
                factor.data.copy_(0.05 * torch.randn(factor.shape, generator=generator))
    ids = tokens().to(device)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(mlp.calls == 1 for mlp in sparse_mlps(model))
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["opt", "llama", pytest.param("phi3", marks=SLOW), pytest.param("gpt2", marks=SLOW)])
def test_models(family: str, device: str) -> None:
    torch.testing.assert_close(
        gradients(family, "triton", device), gradients(family, "torch", device), rtol=1e-3, atol=1e-5
    )


@pytest.mark.slow
@interpreted
def test_training(tmp_path: Path) -> None:
    runs = [
        trainer(patched_opt(active=16, fold_steps=2, backend=backend), tmp_path / backend, max_steps=3)
        for backend in ("torch", "triton")
    ]
    for run in runs:
        run.train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-4)


# Nothing waits for the device


class Watched(TorchDispatchMode):
    """Notes the operations that would wait for a GPU: their results, or the shapes of these, hang on values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").split(".")[0]
        lists = [part for arg in args if isinstance(arg, list | tuple) for part in arg]
        by_mask = name.startswith("index") and any(isinstance(p, Tensor) and p.dtype is torch.bool for p in lists)
        moved = name == "_to_copy" and kwargs.get("device") is not None
        if by_mask or moved or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"):
            self.seen.append(name)
        return func(*args, **kwargs)


class Unwatched:
    """A kernel, which is one operation; in the interpreter it is many."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                self.kernel[grid](*args, **kwargs)

        return launch

    def __call__(self, *args: Any) -> Any:  # by another kernel
        return self.kernel(*args)


BUDGETS = {
    "tiles": Budget(16, 16),
    "all but padding": Budget(),
    "no context": Budget(context=0),
    "tiles of context": Budget(context=16),
}


def run_watched(kind: Kind, budget: Budget, device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of an MLP, with all classes of tokens. What would wait is an error on a GPU, and on the meta
    device, whose tensors have no values; on the processor it is noted."""
    module, mlp, _ = patched(kind, D, M, dtype=torch.float32, tile_size=T, backend=backend)
    if device == "meta":  # forwards refuse updates there, and autocast does not know it
        monkeypatch.setattr(nn.Parameter, "is_meta", False, raising=False)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
        monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    if device == "cpu":
        monkeypatch.setattr(mlp_products, "_all_pass", lambda gradient, share: share >= 1)  # as elsewhere
        for operations in (triton_products, triton_selection, triton_tiles):
            for name, value in list(vars(operations).items()):
                if hasattr(value, "arg_names") and hasattr(value, "run"):
                    monkeypatch.setattr(operations, name, Unwatched(value))
    module.to(device)
    x = torch.randn(N, D).to(device).requires_grad_()
    basis = mlp.index.sketch.basis.to(device)
    correction = Compensation(basis, basis.new_zeros(D, len(basis)), basis.new_zeros(D))
    order = torch.randperm(N).to(device)
    mlp.runtime.padding.may_skip = True
    unwatch_batches(module)  # which is called without labels
    mlp.runtime.passes.begin(BatchClasses({"only": TokenClasses((1, N), order[:5], order[5:12])}))
    with mlp.using(budget, {"context": correction}):
        module(x).sum().backward()  # what is done once
        tokens = 5 * (budget.predicted or M) + 7 * (M if budget.context is None else budget.context)
        assert mlp.work_share() == pytest.approx(tokens / (N * M))
        watched = Watched()
        before = torch.cuda.get_sync_debug_mode() if device == "cuda" else None
        if before is not None:
            torch.cuda.set_sync_debug_mode("error")
        try:
            with nullcontext() if device == "cuda" else watched:
                module(x).sum().backward()
        finally:
            if before is not None:
                torch.cuda.set_sync_debug_mode(before)
    assert not watched.seen


@pytest.mark.filterwarnings("ignore:the base weights")
@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("meta", "torch"),
        pytest.param("cuda", "torch", marks=pytest.mark.gpu),
        pytest.param("cuda", "triton", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(
    kind: Kind, budget: str, device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_watched(kind, BUDGETS[budget], device, backend, monkeypatch)


@interpreted
@pytest.mark.parametrize("kind", ["plain", "gated", *(pytest.param(kind, marks=SLOW) for kind in KINDS[2:])])
def test_nothing_waits_where_kernels_are_launched(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    run_watched(kind, BUDGETS["tiles of context"], "cpu", "triton", monkeypatch)


@pytest.mark.filterwarnings("ignore:the base weights")
@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("budget", BUDGETS)
def test_what_waits_is_seen(budget: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a part of the gradient are counted."""
    with pytest.raises((NotImplementedError, RuntimeError), match=r"item\(\)|synchroniz"):
        run_watched("gated", replace(BUDGETS[budget], gradient=0.9), device, "torch", monkeypatch)


def test_what_waits_is_noted() -> None:
    x = torch.randn(N, D)
    with Watched() as watched:
        x[x > 0].sum().item()
    assert len(watched.seen) > 1


# One input each


class Clamped(nn.Module):
    """A projection that clamps its input first, as Gemma 4's do."""

    def __init__(self, linear: nn.Linear, bound: float) -> None:
        super().__init__()
        self.linear, self.bound = linear, bound

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.clamp(-self.bound, self.bound))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gate_and_up_of_different_inputs(backend: str) -> None:
    module, mlp, twin = patched("gated", D, M, dtype=torch.float32, backend=backend)
    mask = mask_of(force(mlp, N, 19, T), M, torch.float32)
    with torch.no_grad():
        for factor in [factor for p in mlp.projections for factor in p.update.parameters()]:
            factor.zero_()
    for mlp_like in (module, twin):
        mlp_like.gate_proj, mlp_like.up_proj = Clamped(mlp_like.gate_proj, 0.5), Clamped(mlp_like.up_proj, 1.0)
    x = torch.randn(N, D)
    hidden = twin.act_fn(twin.gate_proj(x)) * twin.up_proj(x)
    torch.testing.assert_close(module(x), twin.down_proj(hidden * mask), **TIGHT)


@pytest.mark.parametrize("kind", ["conv1d", "gated"])
def test_rows_to_gather_are_contiguous_and_follow_the_weight(kind: str) -> None:
    module, mlp, twin = patched(kind, D, M, dtype=torch.float32)
    for assign in (False, True):
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(2)
        module.load_state_dict(twin.state_dict(), assign=assign)
        for projection in mlp.projections:
            rows = projection.rows(contiguous=True)
            assert rows.is_contiguous() and torch.equal(rows, projection.rows())
        state = module.state_dict()
        assert all(torch.equal(state[name], value) for name, value in twin.state_dict().items())
