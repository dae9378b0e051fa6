"""Does a model altered after the patch, as users and libraries do it, work, or does a typed error say why not?"""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from helpers.models import CONFIG, VOCABULARY, WIDTH, build, fill_updates, llama, objective, opt, tokens, trained
from helpers.training import patched_opt, trainer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrizations, prune, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hf_subquad import InactivePatchError, check_active, dense_forward, patch_model, sparse_mlps, unpatch_model

FC1 = "model.decoder.layers.1.fc1"


def dense_logits(model: nn.Module) -> Tensor:
    with dense_forward(model), torch.no_grad():
        return model(tokens()).logits


# Weights that are something else than parameters


ALTERED: dict[str, Callable[[nn.Module], object]] = {
    "pruned": lambda projection: prune.l1_unstructured(projection, "weight", 0.5),
    "weight norm": weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "parametrized weight norm": parametrizations.weight_norm,
    "trainable": lambda projection: projection.requires_grad_(True),
    "trainable bias": lambda projection: projection.bias.requires_grad_(True),
}


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
def test_patched_projection_is_altered(alter: Callable[[nn.Module], object], tmp_path: Path) -> None:
    model = trained()
    check_active(model)
    alter(model.get_submodule(FC1))
    with pytest.raises(InactivePatchError, match=r"layers\.1\.fc1.*(permanent before patch_model|freeze it again)"):
        check_active(model)
    with pytest.raises(InactivePatchError):
        trainer(model, tmp_path).train()


def test_whole_model_made_trainable(tmp_path: Path) -> None:
    """Base weights would learn in dense steps and not in sparse ones."""
    model = patched_opt(dense_share=0.5).requires_grad_(True)
    with pytest.raises(InactivePatchError, match="trainable after patch_model"):
        trainer(model, tmp_path).train()


def test_pruning_made_permanent_is_no_hindrance() -> None:
    model = opt()
    prune.l1_unstructured(model.get_submodule(FC1), "weight", 0.5)
    prune.remove(model.get_submodule(FC1), "weight")
    assert (unpatch_model(patch_model(model, CONFIG)).get_parameter(f"{FC1}.weight") == 0).float().mean() == 0.5


# Moves


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_updates_without_values(device: str, training: bool) -> None:
    """PyTorch computes garbage from tensors on the meta device beside others, and says nothing."""
    model = trained().train(training)
    if device == "cpu":
        cpu_offload(model, torch.device("cpu"))
    else:
        model.to("meta")
    with pytest.raises(InactivePatchError, match=r"layers\.1 is on the meta device.*unpatch_model"):
        model.get_submodule(FC1)(torch.randn(3, 5, WIDTH, device=device))


def test_offload_after_unpatching() -> None:
    model = unpatch_model(trained()).eval()
    expected = model(tokens()).logits
    cpu_offload(model, torch.device("cpu"))
    assert torch.equal(model(tokens()).logits, expected)


def test_state_of_a_model_on_the_meta_device() -> None:
    shapes = {name: (value.shape, value.dtype) for name, value in opt().state_dict().items()}
    state = trained().to("meta").state_dict()
    assert all(value.is_meta for value in state.values())
    assert {name: (value.shape, value.dtype) for name, value in state.items()} == shapes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_there_and_back_between_dtypes(dtype: torch.dtype) -> None:
    """Weights come back rounded once, as those of any model; updates come back as they were."""
    model, plain = trained(), opt()
    weights = {name: p for name, p in model.named_parameters() if ".update." not in name}
    updates = {name: p.clone() for name, p in model.named_parameters() if ".update." in name}
    cast = {torch.float16: nn.Module.half, torch.bfloat16: nn.Module.bfloat16, torch.float64: nn.Module.double}[dtype]
    cast(model)
    assert {value.dtype for value in weights.values()} == {dtype}
    model.float()
    for name, value in plain.to(dtype).float().named_parameters():
        assert torch.equal(weights[name], value), name
    assert all(torch.equal(model.get_parameter(name), value) for name, value in updates.items())
    objective(model(tokens()).logits).backward()


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_parameters_are_laid_out_as_before_the_patch(family: str, tmp_path: Path) -> None:
    model, plain = trained(family), build(family)
    objective(model(tokens()).logits).backward()
    weights = {name: p for name, p in model.named_parameters() if ".update." not in name}
    assert torch.equal(parameters_to_vector(weights.values()), parameters_to_vector(plain.parameters()))
    save_file({name: p.detach() for name, p in model.named_parameters()}, tmp_path / "parameters.safetensors")


# Changes beside the patched projections


@pytest.mark.parametrize("family", ["opt", "gemma"])
def test_more_tokens_with_tied_weights(family: str, tmp_path: Path) -> None:
    model = trained(family)
    model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model(torch.tensor([[VOCABULARY + 1, 5, VOCABULARY + 3]])).logits.shape == (1, 3, VOCABULARY + 4)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()).logits, dense_logits(model.eval()), rtol=1e-4, atol=1e-5)


def test_only_the_updates_train_after_freezing_all(tmp_path: Path) -> None:
    model = patched_opt().requires_grad_(False)
    with pytest.raises(InactivePatchError, match="are frozen"):
        check_active(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer(model, tmp_path, max_steps=2).train()  # the callback thaws them
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".update." in name}


def rebind(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """As Liger does it, to instances."""
    module.__dict__["forward"] = forward.__get__(module, type(module))


def test_forward_of_an_mlp_rebound(tmp_path: Path) -> None:
    def fused(self: nn.Module, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    model = patch_model(llama(), CONFIG)
    rebind(model.model.layers[1].mlp, fused)
    with pytest.raises(InactivePatchError, match=r"layers\.1\.mlp \(LlamaMLP\) was rebound"):
        trainer(model, tmp_path).train()
    model = llama()
    for layer in model.model.layers:
        rebind(layer.mlp, fused)
    check_active(patch_model(model, CONFIG))  # before the patch it is the forward that is patched


# Copies that average, and compilers


def test_moving_average_of_a_model(tmp_path: Path) -> None:
    """Factors are averaged one by one, so the average holds an update of its own; what it saves is what it computes."""
    model = trained()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    fill_updates(model, seed=9)
    average.update_parameters(model)
    mine, theirs = (sparse_mlps(m)[0].inputs[0].update for m in (model, average))
    assert theirs is not mine and not torch.equal(theirs.U, mine.U)
    average.module.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = average.eval()(tokens()).logits
        torch.testing.assert_close(plain(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
        assert (expected - model.eval()(tokens()).logits).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled(in_place: bool) -> None:
    """Compiled: what is computed stays the same."""
    model = trained()
    sparse, dense = model(tokens()).logits, dense_logits(copy.deepcopy(model).eval())
    compiled = model
    if in_place:
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    check_active(compiled)
    found = compiled(tokens()).logits
    objective(found).backward()
    assert torch.equal(found, sparse)
    assert all(p.update.U.grad.abs().max() > 0 for mlp in sparse_mlps(compiled) for p in mlp.projections)
    compiled.eval()
    with torch.no_grad():
        assert torch.equal(compiled(tokens()).logits, dense)


# Replaces classes and functions of transformers and torch, so it runs in a process of its own.
LIGER = """
import torch
from helpers.models import CONFIG, llama
from liger_kernel.transformers import apply_liger_kernel_to_llama
from hf_subquad import InactivePatchError, UnsupportedModuleError, check_active, patch_model

def refused(error, step, *words):
    try:
        step()
    except error as caught:
        assert all(word in str(caught) for word in words), caught
    else:
        raise AssertionError("not refused")

apply_liger_kernel_to_llama(swiglu=False)
check_active(patch_model(llama(), CONFIG))
patched = patch_model(llama(), CONFIG)
apply_liger_kernel_to_llama(model=patched)
refused(InactivePatchError, lambda: check_active(patched), "layers.1.mlp", "rebound")
refused(UnsupportedModuleError, lambda: patch_model(llama(), CONFIG), "LigerSwiGLUMLP", "cannot be made sparse")
"""


def test_liger_itself() -> None:
    pytest.importorskip("liger_kernel")
    done = subprocess.run(
        [sys.executable, "-c", LIGER],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
