"""Are MLPs that are written in unusual ways found, patched and right, and what is no wide MLP left alone?"""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.models import CONFIG, build, fill_updates, opt, tokens
from helpers.reference import mask_of, plain_output, selections_by_mlp
from helpers.training import patched_opt, trainer
from torch import Tensor, nn

from hf_subquad import (
    NoMatchError,
    SubquadConfig,
    UnsupportedModuleError,
    dense_forward,
    patch_model,
    sparse_mlps,
    unpatch_model,
)
from hf_subquad.index.selection_quality import exact_activations

D, M = 12, 30
ALL = SubquadConfig(**{**CONFIG.to_dict(), "layers_to_transform": "all"})


class InlineActivation(nn.Module):
    """As LFM2 writes it, and ESM with GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(D, M, False), nn.Linear(D, M, False), nn.Linear(M, D, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ResidualArgument(nn.Module):
    """As Bloom and MPT write it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense_h_to_4h, self.gelu_impl, self.dense_4h_to_h = nn.Linear(D, M), nn.GELU("tanh"), nn.Linear(M, D)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.gelu_impl(self.dense_h_to_4h(hidden_states))) + residual


class OwnLinear(nn.Linear):
    """As Falcon writes it."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = OwnLinear(D, M), nn.ReLU(inplace=True), OwnLinear(M, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x))).add_(x)


class Stacked(nn.Module):
    """As ModernBERT writes it, its class names the gate nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.Wi, self.act, self.Wo = nn.Linear(D, 2 * M), nn.GELU(), nn.Linear(M, D)

    def forward(self, x: Tensor) -> Tensor:
        gated, gate = self.Wi(x).chunk(2, dim=-1)
        return self.Wo(self.act(gated) * gate)


class Holder(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, input_tensor: Tensor | None = None) -> Tensor:
        return self.dense(x).relu() if input_tensor is None else self.dense(x) + input_tensor


class NeedsMore(nn.Module):
    """As DeBERTa: the layer cannot be run by itself, its attention wants a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.intermediate, self.output = Holder(D, M), Holder(M, D)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x * mask.unsqueeze(-1)
        return self.output(self.intermediate(x), x)


class Model(nn.Module):
    """Calls its MLP twice, as ALBERT does, with whatever the MLP takes."""

    def __init__(self, mlp: nn.Module, *more: Tensor) -> None:
        super().__init__()
        self.mlp, self.more = mlp.double(), more

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(x, *(x if part is None else part for part in self.more))
        return x + self.mlp(F.layer_norm(x, (D,)), *(x if part is None else part for part in self.more))


UNUSUAL = {
    "activation written inline": lambda: Model(InlineActivation()),
    "residual as an argument": lambda: Model(ResidualArgument(), None),
    "linear subclass, in place": lambda: Model(InPlace()),
    "gate and up in one": lambda: Model(Stacked()),
    "parent that does not run by itself": lambda: Model(NeedsMore(), torch.ones(3, 5).double()),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_equals_a_masked_dense_model(kind: str) -> None:
    model = UNUSUAL[kind]()
    plain = copy.deepcopy(model)
    patch_model(model, ALL)
    fill_updates(model)
    (mlp,) = sparse_mlps(model)
    assert mlp.index.neurons == M
    x, twin = (torch.randn(3, 5, D, generator=torch.Generator().manual_seed(4)).double() for _ in range(2))
    with selections_by_mlp(model) as selections:
        got = model(x.requires_grad_())
    masks = [[mask_of(selection, M, torch.float64) for selection in made] for made in selections]
    assert [len(made) for made in masks] == [2]
    expected, leaves = plain_output(plain, model, {"x": twin.requires_grad_()}, masks)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert (got - plain_output(plain, model, {"x": twin}, None)[0]).abs().max() > 1e-3
    got.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-5, atol=1e-5)
    for name, value in leaves.items():
        torch.testing.assert_close(model.get_parameter(name).grad, value.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unpatch_restores_the_modules_themselves(kind: str) -> None:
    model = UNUSUAL[kind]()
    before = {name: (module, type(module)) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    unpatch_model(patch_model(model, ALL))
    assert {name: (module, type(module)) for name, module in model.named_modules()} == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_index_scores_by_the_activation_that_is_written_inline(activation: str) -> None:
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(D, M), nn.Linear(M, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(getattr(F, activation)(self.fc1(x)))

    module = patch_model(Inline(), ALL)
    (mlp,) = sparse_mlps(module)
    x = torch.randn(7, D)
    expected = getattr(F, activation)(mlp.inputs[0].dense(x))
    torch.testing.assert_close(exact_activations(mlp.index, x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("into", "out_of", "why"),
    [
        (nn.Linear(D, D), nn.Linear(D, D), "not have more neurons"),
        (nn.Linear(D, M), nn.Linear(M, 2), "not have .* as many outputs"),
        (nn.Linear(D, M), nn.Linear(M + 1, D), "fc1 / fc2"),
    ],
    ids=["not wide", "head", "no MLP"],
)
def test_what_is_no_wide_mlp_is_left_alone_and_named(
    caplog: pytest.LogCaptureFixture, into: nn.Module, out_of: nn.Module, why: str
) -> None:
    wide, other = InPlace(), InPlace()
    other.fc1, other.fc2 = into, out_of
    (mlp,) = sparse_mlps(patch_model(nn.ModuleDict({"wide": wide, "other": other}), ALL))
    assert mlp.name == "wide"
    assert "MLPs that do not widen (other: 1 in all) cannot be patched" in caplog.text
    with pytest.raises(NoMatchError, match=why):
        patch_model(nn.ModuleDict({"other": other}), ALL)


def test_fused_experts_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.gate_up_proj = nn.Parameter(torch.randn(4, D, 2 * M))
    with pytest.raises(NoMatchError, match=r"3-D parameters \(experts\.gate_up_proj\)"):
        patch_model(model, ALL)
    model.wide = InPlace()
    patch_model(model, ALL)
    assert "experts in 3-D parameters (experts.gate_up_proj: 1 in all) cannot be patched" in caplog.text


def test_parent_that_does_not_run_and_holds_its_projections_itself() -> None:
    class Direct(InPlace):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x * mask)

    with pytest.raises(UnsupportedModuleError, match=r"mlp .Direct. .* does not run by itself"):
        patch_model(Model(Direct(), torch.ones(1)), ALL)


def test_gradients_of_gradients_need_dense_mlps() -> None:
    model = patch_model(opt(), CONFIG)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.dim() > 1)

    def penalty() -> Tensor:
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = model(tokens(), labels=tokens()).loss
            grads = torch.autograd.grad(loss, trained, create_graph=True, allow_unused=True)
            return sum((grad.square().sum() for grad in grads if grad is not None), start=torch.zeros(()))

    with pytest.raises(RuntimeError, match="once_differentiable"):
        penalty().backward()
    with dense_forward(model):
        penalty().backward()


def test_hooks_between_the_projections_see_what_they_would_in_the_plain_model(caplog: pytest.LogCaptureFixture) -> None:
    """Statistics of activations, say, which are by neuron."""
    model, plain = patch_model(build("bert"), CONFIG), build("bert")
    shapes: list[list[tuple[int, ...]]] = [[], []]
    for one, seen in zip((model, plain), shapes, strict=True):
        for layer in one.bert.encoder.layer:
            layer.intermediate.intermediate_act_fn.register_forward_hook(
                lambda module, args, output, seen=seen: seen.append(tuple(output.shape))
            )
        one(tokens(), labels=tokens()).loss.backward()
    assert shapes[0] == shapes[1]
    assert "runs dense, as forward hooks" in caplog.text


def test_training_with_such_hooks_goes_on(tmp_path: Path) -> None:
    model = patched_opt()
    for layer in model.model.decoder.layers:
        layer.activation_fn.register_forward_hook(lambda module, args, output: print(output.mean(1).shape))
    run = trainer(model, tmp_path, max_steps=7)
    run.train()
    assert run.state.global_step == 7 and not any(mlp.calls for mlp in sparse_mlps(model))


def test_another_default_device() -> None:
    """Tensors are made where the model is."""
    with torch.device("meta"):
        model = patch_model(opt_on_the_cpu(), CONFIG)
        for mlp in sparse_mlps(model):
            x = torch.randn(3, 7, mlp.opens.shape[1], device="cpu", requires_grad=True)
            mlp.index.fit(x)
            y = mlp.output(mlp.index.combine([projection(x) for projection in mlp.inputs]))
            y.sum().backward()
            assert x.grad is not None and x.grad.device.type == "cpu"


def opt_on_the_cpu() -> nn.Module:
    with torch.device("cpu"):
        return opt()
