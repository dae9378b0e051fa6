"""Is what cannot be made sparse refused by name, with the model left exactly as it was?"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.models import CONFIG, assert_same, build, llama, opt, snapshot
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers import AutoModelForCausalLM

from hf_subquad import (
    AlreadyPatchedError,
    ConfigError,
    SubquadConfig,
    SubquadError,
    UnsupportedModuleError,
    WeightsError,
    patch_model,
    sparse_mlps,
)
from hf_subquad.errors import PatchError

D, M = 12, 30


class MLP(nn.Module):
    """A well-behaved MLP; its children below misbehave."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(D, M), nn.Linear(M, D), nn.ReLU()

    def middle(self, hidden: Tensor) -> Tensor:
        return self.act(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.middle(self.fc1(x)))


class RMSNormInside(MLP):
    """BitNet's sub-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn_sub_norm = nn.RMSNorm(M)

    def middle(self, hidden: Tensor) -> Tensor:
        return self.ffn_sub_norm(self.act(hidden))


class NormWithoutWeights(MLP):
    """Runs on any number of neurons, with another result."""

    def middle(self, hidden: Tensor) -> Tensor:
        return F.layer_norm(self.act(hidden), hidden.shape[-1:])


class SoftmaxInside(MLP):
    def middle(self, hidden: Tensor) -> Tensor:
        return hidden.softmax(-1) * self.act(hidden)


class TopKInside(MLP):
    def middle(self, hidden: Tensor) -> Tensor:
        hidden = self.act(hidden)
        top = hidden.topk(max(1, hidden.shape[-1] // 4), -1)
        return torch.zeros_like(hidden).scatter(-1, top.indices, top.values)


class ClampToLargest(MLP):
    """It depends on the largest activation of all tokens."""

    def middle(self, hidden: Tensor) -> Tensor:
        hidden = self.act(hidden)
        return hidden.clamp(max=0.8 * hidden.max())


class OnlyLarge(MLP):
    def middle(self, hidden: Tensor) -> Tensor:
        hidden = self.act(hidden)
        return hidden.where(hidden.abs() > hidden.abs().max() / 2, 0)


class ScalePerNeuron(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(M) + 0.5)

    def middle(self, hidden: Tensor) -> Tensor:
        return self.act(hidden) * self.scale


class LyingActivation(MLP):
    def middle(self, hidden: Tensor) -> Tensor:
        return F.gelu(hidden)


class ClampAfterActivation(MLP):
    def middle(self, hidden: Tensor) -> Tensor:
        return self.act(hidden).clamp(max=0.05)


class NoActivation(MLP):
    def __init__(self) -> None:
        super().__init__()
        del self.act

    def middle(self, hidden: Tensor) -> Tensor:
        return hidden.sin()


class TokensMixed(MLP):
    """Elementwise over neurons, but not over tokens."""

    def middle(self, hidden: Tensor) -> Tensor:
        return self.act(hidden) + hidden.roll(1, dims=-2)


class FirstProjectionUnused(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(F.linear(x, self.fc1.weight, self.fc1.bias)))


class QuantisedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight * 20).round() / 20, self.bias)


class WrappedTensor(Tensor):
    """As torchao holds quantised weights and FSDP holds shards: under a plain nn.Linear."""


class PackedLinear(nn.Module):
    """As GPTQ and AWQ hold them: no `weight` at all."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(3, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], M)


def stack(*mlps: nn.Module) -> nn.Module:
    """Layers that are called one after the other; the first stays dense by default."""
    model = nn.Module()
    model.layers = nn.ModuleList(mlps)
    return model


def with_leaf(leaf: nn.Module) -> nn.Module:
    model = stack(MLP(), MLP(), MLP())
    model.layers[2].fc1 = leaf
    return model


def spoiled(kind: str, path: str, value: float) -> nn.Module:
    model = build(kind)
    parameter = model.get_parameter(path)
    with torch.no_grad():
        parameter.view(-1)[-1] = value
    return model


def refused(model: nn.Module, error: type[SubquadError], *words: str, config: SubquadConfig = CONFIG) -> None:
    model.get_parameter(next(n for n, _ in model.named_parameters())).requires_grad_(False)
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(error) as caught:
        patch_model(model, config)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert_same(before, snapshot(model))
    assert not sparse_mlps(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_well_behaved_one_is_accepted() -> None:
    assert len(sparse_mlps(patch_model(stack(MLP(), MLP(), MLP()), CONFIG))) == 2


MISBEHAVED = [
    RMSNormInside, NormWithoutWeights, SoftmaxInside, TopKInside, ClampToLargest, OnlyLarge, ScalePerNeuron,
    LyingActivation, ClampAfterActivation, NoActivation, TokensMixed, FirstProjectionUnused,
]  # fmt: skip


@pytest.mark.parametrize("kind", MISBEHAVED)
@pytest.mark.parametrize("active", [0.4, 1.0])
def test_middle_that_cannot_be_compacted(kind: type[MLP], active: float) -> None:
    config = SubquadConfig(**{**CONFIG.to_dict(), "active": active})
    refused(stack(MLP(), kind(), kind()), UnsupportedModuleError, "layers.1", kind.__name__, config=config)


@pytest.mark.parametrize("kind", MISBEHAVED)
def test_refusal_after_another_was_patched(kind: type[MLP]) -> None:
    """The first MLP is swapped already when the second fails: it must come back."""
    refused(stack(MLP(), MLP(), kind()), UnsupportedModuleError, "layers.2")


def test_refusal_leaves_transposed_weights_contiguous() -> None:
    """GPT-2's inputs and OPT's outputs are stored by neuron while patched."""
    for model, path in ((build("gpt2"), "transformer.h.2.mlp"), (build("opt"), "model.decoder.layers.2")):
        act = {"gpt2": "act", "opt": "activation_fn"}[model.config.model_type]
        setattr(model.get_submodule(path), act, nn.Softmax(-1))
        refused(model, UnsupportedModuleError, path)


@pytest.mark.parametrize("number", [1, 2])
def test_odd_one_out_among_mlps_of_one_class(number: int) -> None:
    """Per-layer settings: the same class, another middle."""

    class Switched(MLP):
        sparsity = 0.0

        def middle(self, hidden: Tensor) -> Tensor:
            hidden = self.act(hidden)
            return hidden if not self.sparsity else (hidden - hidden.mean(-1, keepdim=True)).relu()

    model = stack(Switched(), Switched(), Switched())
    model.layers[number].sparsity = 0.9
    refused(model, UnsupportedModuleError, f"layers.{number}")


def test_quantised_subclass() -> None:
    refused(with_leaf(QuantisedLinear(D, M)), UnsupportedModuleError, "layers.2.fc1", "QuantisedLinear")


def test_weight_that_is_no_plain_parameter() -> None:
    model = stack(MLP(), MLP(), MLP())
    leaf = model.layers[2].fc1
    leaf.weight = nn.Parameter(leaf.weight.detach().as_subclass(WrappedTensor))
    refused(model, UnsupportedModuleError, "layers.2.fc1", "WrappedTensor")


def test_packed_leaf_without_weight() -> None:
    refused(with_leaf(PackedLinear()), UnsupportedModuleError, "layers.2.fc1", "PackedLinear")


def test_integer_weights() -> None:
    model = stack(MLP(), MLP(), MLP())
    model.layers[2].fc1.weight = nn.Parameter(torch.zeros(M, D, dtype=torch.int8), requires_grad=False)
    refused(model, UnsupportedModuleError, "layers.2.fc1", "int8")


def test_leaf_with_a_forward_of_its_own() -> None:
    model = stack(MLP(), MLP(), MLP())
    leaf = model.layers[2].fc1
    leaf.forward = lambda x: 2 * F.linear(x, leaf.weight, leaf.bias)
    refused(model, UnsupportedModuleError, "layers.2.fc1")


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_leaf_with_hooks(register: str) -> None:
    """They would be dropped: what they do would silently stop."""
    model = stack(MLP(), MLP(), MLP())
    getattr(model.layers[2].fc2, register)(lambda *_: None)
    refused(model, UnsupportedModuleError, "layers.2.fc2")


@pytest.mark.parametrize(
    "alter",
    [
        lambda leaf: prune.l1_unstructured(leaf, "weight", 0.5),
        lambda leaf: prune.random_unstructured(leaf, "bias", 0.5),
        spectral_norm,
        weight_norm,
        parametrizations.orthogonal,
    ],
    ids=["pruned", "pruned bias", "spectral norm", "weight norm", "parametrized"],
)
def test_leaf_whose_weight_is_computed(alter: Callable[[nn.Module], object]) -> None:
    model = stack(MLP(), MLP(), MLP())
    alter(model.layers[2].fc1)
    refused(
        model,
        UnsupportedModuleError,
        "layers.2.fc1",
        "prune.remove" if model.layers[2].fc1._forward_pre_hooks else "parametrizations",
    )


def test_device_map(tmp_path: Path) -> None:
    """One device is fine; what is offloaded comes and goes by hooks, which the patch would drop."""
    opt().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="cpu")
    assert sparse_mlps(patch_model(model, CONFIG))
    places = {name: "cpu" for name, _ in model.named_modules() if name.count(".") == 2}
    places |= {f"model.decoder.layers.{i}": "cpu" for i in range(3)} | {
        "lm_head": "cpu",
        "model.decoder.layers.2": "disk",
    }
    del places["model.decoder.layers"]
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk"
    )
    refused(model, UnsupportedModuleError, "device_map")


def test_leaf_wrapped_by_peft() -> None:
    model = get_peft_model(opt(), LoraConfig(target_modules=["fc1", "q_proj"], r=2))
    refused(model, UnsupportedModuleError, "fc1", "PEFT")


@pytest.mark.parametrize("whole", [True, False])
def test_meta_device(whole: bool) -> None:
    if whole:
        with torch.device("meta"):
            model = stack(MLP(), MLP(), MLP())
    else:
        model = with_leaf(nn.Linear(D, M, device="meta"))
    refused(model, UnsupportedModuleError, "meta", "fc1")


def test_weight_that_was_taken_away() -> None:
    """As DeepSpeed ZeRO-3 leaves a parameter whose values are on other ranks."""
    model = stack(MLP(), MLP(), MLP())
    model.layers[2].fc1.weight.data = torch.empty(0)
    refused(model, UnsupportedModuleError, "layers.2.fc1", "ZeRO-3")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("opt", "model.decoder.layers.2.fc1.weight"),
        ("opt", "model.decoder.layers.1.fc2.bias"),
        ("llama", "model.layers.2.mlp.up_proj.weight"),
        ("gpt2", "transformer.h.2.mlp.c_proj.weight"),
    ],
)
def test_weights_that_are_not_finite(family: str, path: str, value: float) -> None:
    refused(spoiled(family, path, value), WeightsError, path)


def test_spoiled_weights_that_stay_dense_do_not_matter() -> None:
    model = patch_model(spoiled("opt", "model.decoder.layers.0.fc1.weight", float("nan")), CONFIG)
    assert len(sparse_mlps(model)) == 2


def test_rank_larger_than_a_side() -> None:
    config = SubquadConfig(**{**CONFIG.to_dict(), "rank": 21})
    refused(opt(), ConfigError, "rank=21", "layers.1.fc1", "(52, 20)", config=config)
    patch_model(opt(), SubquadConfig(**{**CONFIG.to_dict(), "rank": 20}))


@pytest.mark.parametrize("make", [opt, llama, lambda: build("phi3")])
def test_more_active_neurons_than_there_are(make: Callable[[], nn.Module]) -> None:
    config = SubquadConfig(**{**CONFIG.to_dict(), "active": 53})
    refused(make(), ConfigError, "active=53", "52", config=config)


def test_patched_already() -> None:
    model = patch_model(opt(), CONFIG)
    before, mlps = snapshot(model), sparse_mlps(model)
    with pytest.raises(AlreadyPatchedError, match="unpatch_model"):
        patch_model(model, CONFIG)
    with pytest.raises(PatchError):
        patch_model(model)
    assert_same(before, snapshot(model))
    assert sparse_mlps(model) == mlps


def test_interrupted_patch_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gpt2")
    before = snapshot(model)
    from hf_subquad.patching import patch as patching

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(patching, "self_test", stop)
    with pytest.raises(KeyboardInterrupt):
        patch_model(model, CONFIG)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("training", [True, False])
def test_self_test_leaves_modes_alone(training: bool) -> None:
    model = opt().train(training)
    model.model.decoder.layers[1].self_attn.train(not training)
    modes = {name: module.training for name, module in model.named_modules()}
    patch_model(model, CONFIG)
    assert {n: m.training for n, m in model.named_modules() if not n.endswith(".update")} == modes


@pytest.mark.parametrize("seed", [2**30, 2**31 - 1, 2**32 - 1])
def test_large_seeds(seed: int) -> None:
    model = patch_model(opt(), SubquadConfig(**{**CONFIG.to_dict(), "seed": seed}))
    drawn = [p.update.V for mlp in sparse_mlps(model) for p in mlp.inputs]
    assert not torch.equal(drawn[0], drawn[1])


def test_library_errors_are_also_standard_ones() -> None:
    for error, standard in ((WeightsError, ValueError), (ConfigError, ValueError), (AlreadyPatchedError, ValueError)):
        assert issubclass(error, standard)
