"""Can all that was learnt leave a patched model, beside adapters of any kind, under plain names?"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.models import CONFIG, build, fill_updates, llama, opt, tokens
from helpers.training import TRAIN, listening, patched_opt, trainer
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from hf_subquad import (
    PatchError,
    SubquadConfig,
    UnsupportedModuleError,
    calibrate,
    merged_named_weights,
    patch_model,
    save_merged,
    sparse_mlps,
    sync_model,
)

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
KINDS: dict[str, Callable[[], nn.Module]] = {
    "patch alone": lambda: patched_opt(),
    "no patch": opt,
    "PEFT after": lambda: get_peft_model(patched_opt(), LORA),
    "PEFT before": lambda: patch_model(get_peft_model(opt(), LORA), TRAIN),
    "all-linear": lambda: get_peft_model(patched_opt(), LoraConfig(r=2, target_modules="all-linear")),
    "DoRA": lambda: get_peft_model(patched_opt(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)),
    "IA3": lambda: get_peft_model(patched_opt(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
    "a module trained in full": lambda: get_peft_model(
        patched_opt(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["final_layer_norm"])
    ),
    "new tokens": lambda: get_peft_model(
        patched_opt(), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4])
    ),
    "add_adapter": lambda: with_adapter(patched_opt()),
    "add_adapter before": lambda: patch_model(with_adapter(opt()), TRAIN),
}


def with_adapter(model: nn.Module) -> nn.Module:
    model.add_adapter(LORA)
    return model


def filled(kind: str) -> nn.Module:
    model = KINDS[kind]()
    fill_updates(model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name or "modules_to_save" in name or "tokens_delta" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_plain_names_and_merged_values(kind: str, tmp_path: Path) -> None:
    model = filled(kind)
    expected = model(input_ids=tokens()).logits.detach()
    before = {name: p.clone() for name, p in model.named_parameters()}
    plain = opt()
    weights = dict(merged_named_weights(model))
    assert list(weights) == list(plain.state_dict())
    assert all(value.shape == plain.state_dict()[name].shape for name, value in weights.items())
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain.eval()(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    if kind != "no patch":
        assert (opt().eval()(tokens()).logits - expected).abs().max() > 1e-2

    save_merged(model, tmp_path)
    again, info = type(opt()).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(again.eval()(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(input_ids=tokens()).logits, expected)
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in before.items())


def test_wrapped_by_a_compiler() -> None:
    model = filled("PEFT after")
    names = [name for name, _ in merged_named_weights(torch.compile(model, backend="eager"))]
    assert names == list(opt().state_dict())


def test_learnt_prompts_cannot_be_merged(tmp_path: Path) -> None:
    model = get_peft_model(patched_opt(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(PatchError, match="prompts"):
        save_merged(model, tmp_path)


def test_an_unknown_wrapper_of_peft_is_refused_by_name(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self, original_module: nn.Module) -> None:
            super().__init__()
            self.original_module = original_module

    model = get_peft_model(patched_opt(), LORA)
    decoder = model.base_model.model.model.decoder
    decoder.final_layer_norm = Wrapper(decoder.final_layer_norm)
    with pytest.raises(PatchError, match="final_layer_norm cannot be merged"):
        save_merged(model, tmp_path)


@pytest.mark.parametrize("kind", ["patch alone", "PEFT after", "add_adapter", "add_adapter before"])
def test_the_advice_after_training_works(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is given where `save_model` writes adapters only."""
    said = listening(monkeypatch, "training.callback")
    model = KINDS[kind]()
    trainer(model, tmp_path, max_steps=2).train()
    expected = model.eval()(input_ids=tokens()).logits.detach()
    advice = [text for text in said if "adapters only" in text]
    assert bool(advice) == bool(said) == (kind != "patch alone")
    assert all("hf_subquad.save_merged(model, folder)" in text for text in advice)
    save_merged(model, tmp_path / "out")
    again = type(opt()).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(tokens()).logits, expected, rtol=1e-4, atol=1e-5)


# As an `nn.Linear` behaves


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "phi3"])
def test_sizes_of_projections(family: str) -> None:
    plain = build(family)
    for mlp in sparse_mlps(patch_model(build(family), CONFIG)):
        for path, projection in zip(mlp.sources, mlp.projections, strict=True):
            source = plain.get_submodule(f"{mlp.name}.{path}")
            sizes = (source.nx, source.nf) if hasattr(source, "nf") else (source.in_features, source.out_features)
            assert (projection.in_features, projection.out_features) == sizes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_default_dtype(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = patch_model(opt(dtype), SubquadConfig(rank=3, tile_size=5, sketch_rank=12))
        calibrate(model, [{"input_ids": tokens(seed), "labels": tokens(seed)} for seed in range(2)])
        sync_model(model, 0)
        model.train()(tokens(), labels=tokens()).loss.backward()
    finally:
        torch.set_default_dtype(before)
    for mlp in sparse_mlps(model):
        assert mlp.index.sketch.basis.dtype == torch.float32
        assert all(p.update.U.dtype == torch.float32 and p.update.U.grad is not None for p in mlp.projections)


# What is refused by name


@pytest.mark.parametrize("other", [0, 1])
def test_one_parameter_in_two_layers(other: int) -> None:
    """Also if one of the two is not to be patched."""
    model = llama()
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[other].mlp.up_proj.weight
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    with pytest.raises(
        UnsupportedModuleError, match=r"up_proj\.weight and model\.layers\.2\.mlp\.up_proj\.weight are one"
    ):
        patch_model(model, CONFIG)
    assert before == {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    patch_model(model, SubquadConfig(**{**CONFIG.to_dict(), "layers_to_transform": [1 - other]}))


def test_one_module_in_two_layers_is_one() -> None:
    model = opt()
    layers = model.model.decoder.layers
    layers[2] = layers[1]
    assert len(sparse_mlps(patch_model(model, CONFIG))) == 1


@pytest.mark.parametrize("names", [["q_proj", "fc1", "fc2"], ["gate_proj"]])
def test_lora_on_patched_projections(names: list[str]) -> None:
    model = patched_opt() if "fc1" in names else patch_model(llama(), TRAIN)
    with pytest.raises(
        ValueError, match=r"made sparse by hf_subquad: leave it out of PEFT's target_modules.*all-linear"
    ):
        get_peft_model(model, LoraConfig(r=2, target_modules=names, layers_to_transform=[1]))
