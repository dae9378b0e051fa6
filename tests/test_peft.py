"""Do PEFT's methods on the rest of the model train, save, reload and merge beside the patch, in either order?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import llama, opt, tokens
from helpers.training import TRAIN, Texts, arguments, factors, trainer
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from torch import nn
from transformers import Trainer

from hf_subquad import InactivePatchError, PatchError, SubquadCallback, load_sidecar, patch_model, save_sidecar

ATTENTION: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}

METHODS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA": lambda: LoraConfig(r=2, **ATTENTION),
    "DoRA": lambda: LoraConfig(r=2, use_dora=True, **ATTENTION),
    "PiSSA": lambda: LoraConfig(r=2, init_lora_weights="pissa", **ATTENTION),
    "LoRA and a module trained in full": lambda: LoraConfig(r=2, modules_to_save=["final_layer_norm"], **ATTENTION),
    "IA3": lambda: IA3Config(feedforward_modules=[], **ATTENTION),
    "LoHa": lambda: LoHaConfig(r=2, **ATTENTION),
    "LoKr": lambda: LoKrConfig(r=2, **ATTENTION),
    "OFT": lambda: OFTConfig(oft_block_size=5, **ATTENTION),
    "new tokens": lambda: TrainableTokensConfig(
        task_type="CAUSAL_LM", target_modules=["embed_tokens"], token_indices=[3, 4]
    ),
}
ORDERS = ("peft first", "patch first")
FAST = ("LoRA", "DoRA", "LoRA and a module trained in full")


def both(order: str, config: PeftConfig) -> nn.Module:
    if order == "peft first":
        return patch_model(get_peft_model(opt(), config), TRAIN)
    return get_peft_model(patch_model(opt(), TRAIN), config)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_trains_reloads_and_merges(tmp_path: Path, method: str, order: str) -> None:
    model = both(order, METHODS[method]())
    start = {name: p.clone() for name, p in model.named_parameters()}
    before = {name: start[name] for name, p in model.named_parameters() if p.requires_grad or ".update." in name}
    trainer(model, tmp_path / "run", max_steps=3).train()
    adapters = [name for name in before if ".update." not in name]
    assert adapters and len(before) - len(adapters) == 8
    for name, value in start.items():
        assert torch.equal(value, model.get_parameter(name)) == (name not in before), name
    expected = model.eval()(input_ids=tokens()).logits.detach()

    model.save_pretrained(tmp_path / "adapters")
    save_sidecar(model, tmp_path / "adapters", 3)
    again = PeftModel.from_pretrained(patch_model(opt(), TRAIN), tmp_path / "adapters")
    assert not torch.allclose(again.eval()(input_ids=tokens()).logits, expected, atol=1e-4)  # adapters are not all
    load_sidecar(again, tmp_path / "adapters")
    assert torch.equal(again(input_ids=tokens()).logits, expected)

    model.merge_and_unload().save_pretrained(tmp_path / "plain")
    plain = type(opt()).from_pretrained(tmp_path / "plain").eval()
    assert list(plain.state_dict()) == list(opt().state_dict())
    torch.testing.assert_close(plain(tokens()).logits, expected, rtol=1e-4, atol=1e-5)


def test_prompt_tuning_puts_more_tokens_into_the_tiles(tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = both("patch first", config)
    prompt = model.prompt_encoder["default"].embedding.weight
    before, updates = prompt.clone(), factors(model)
    trainer(model, tmp_path, max_steps=3).train()
    assert not torch.equal(prompt, before)
    assert all(not torch.equal(updates[name], value) for name, value in factors(model).items())


@pytest.mark.parametrize("method", ["LoRA", "prompt tuning"])
@pytest.mark.parametrize("first", ORDERS)
def test_resumes_in_the_other_order(tmp_path: Path, method: str, first: str) -> None:
    """MLPs have the same names, and factors the same start, whichever of PEFT and the patch comes first."""
    config = METHODS.get(method, lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model, again = both(first, config()), both(next(order for order in ORDERS if order != first), config())
    assert factors(model).keys() == factors(again).keys() == factors(patch_model(opt(), TRAIN)).keys()
    assert all(torch.equal(value, factors(again)[name]) for name, value in factors(model).items())
    trainer(model, tmp_path, max_steps=3, save_strategy="steps", save_steps=2).train()
    trainer(again, tmp_path, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in factors(model).items():
        torch.testing.assert_close(factors(again)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, modules_to_save=["fc1"], **ATTENTION),
        LoraConfig(r=2, target_parameters=["fc1.weight"], **ATTENTION),
        LoraConfig(r=2, bias="all", **ATTENTION),
    ],
    ids=["modules_to_save", "target_parameters", "bias"],
)
def test_peft_on_what_is_patched(tmp_path: Path, config: LoraConfig) -> None:
    model = both("patch first", config)
    with pytest.raises(InactivePatchError, match=r"layers\.1\.fc1"):
        trainer(model, tmp_path).train()


def test_a_single_adapter_of_any_name_trains(tmp_path: Path) -> None:
    """Only beside another one is an adapter called "ref" the reference of a comparison."""
    model = get_peft_model(patch_model(opt(), TRAIN), LoraConfig(r=2, **ATTENTION), adapter_name="ref")
    before = factors(model)
    trainer(model, tmp_path, max_steps=2).train()
    assert all(not torch.equal(value, before[name]) for name, value in factors(model).items())


def test_peft_after_the_patch_in_model_init(tmp_path: Path) -> None:
    """The callback sees the model that is trained too late to thaw its updates."""
    run = Trainer(model_init=lambda: both("patch first", METHODS["LoRA"]()), args=arguments(tmp_path),
                  train_dataset=Texts(), callbacks=[SubquadCallback()])  # fmt: skip
    with pytest.raises(InactivePatchError, match=r"frozen.*model_init"):
        run.train()


def test_whole_mlps_in_modules_to_save(tmp_path: Path) -> None:
    """PEFT would train a copy of every MLP, patched as it is, and keep the original."""
    model = get_peft_model(patch_model(llama(), TRAIN), LoraConfig(r=2, modules_to_save=["mlp"], **ATTENTION))
    with pytest.raises(PatchError, match="modules_to_save"):
        trainer(model, tmp_path)
