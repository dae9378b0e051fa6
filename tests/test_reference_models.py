"""Is the reference model that preference trainers compare with the base model, and are both passes alike?"""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import checkpoint_activations, fill_updates, opt, tokens
from helpers.training import TRAIN, factors, patched_opt
from helpers.trl_runs import CONTENTS, demo_tokenizer, llama_for, pairs, settings
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_subquad import (
    InactivePatchError,
    SubquadCallback,
    SubquadConfig,
    dense_forward,
    patch_model,
    sparse_mlps,
    sync_model,
    unpatch_model,
)

trl = pytest.importorskip("trl")

LORA = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
IA3 = IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], feedforward_modules=[])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


# PEFT's switch


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", [LORA, IA3], ids=["LoRA", "IA3"])
@pytest.mark.parametrize("order", ["peft first", "patch first"])
def test_disabled_adapters_leave_the_base_model(order: str, config: PeftConfig, training: bool) -> None:
    base = logits(opt().eval())
    if order == "peft first":
        model = patch_model(get_peft_model(opt(), config), TRAIN)
    else:
        model = get_peft_model(patch_model(opt(), TRAIN), config)
    fill_updates(model)
    model.train(training)
    live = logits(model)
    assert (live - base).abs().max() > 1e-3
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(input_ids=tokens()).logits, logits(model))  # with gradients, too
    assert torch.equal(logits(model), live)


def test_adapters_of_transformers_own_integration() -> None:
    model = patched_opt()
    model.add_adapter(LORA)
    fill_updates(model)
    live = logits(model.eval())
    model.disable_adapters()
    torch.testing.assert_close(logits(model), logits(opt().eval()), rtol=1e-5, atol=1e-5)
    model.enable_adapters()
    assert torch.equal(logits(model), live)


def test_copies_follow_the_switch_of_their_own() -> None:
    model = get_peft_model(patched_opt(), LORA).eval()
    fill_updates(model)
    live = logits(model)
    twin = copy.deepcopy(model)
    with model.disable_adapter():
        assert torch.equal(logits(twin), live)
    with twin.disable_adapter():
        assert torch.equal(logits(model), live)
        assert not torch.equal(logits(twin), live)


def test_gradients_recomputed_after_a_reference_pass() -> None:
    """Gradient checkpointing runs the policy's layers again after the reference pass: with updates."""
    found = []
    for checkpointing in (False, True):
        model = get_peft_model(patched_opt(), LORA)
        fill_updates(model)
        if checkpointing:
            checkpoint_activations(model, False)
        policy = model(input_ids=tokens()).logits
        with torch.no_grad(), model.disable_adapter():
            reference = model(input_ids=tokens()).logits
        (policy - reference).square().mean().backward()
        found.append(model.base_model.model.model.decoder.layers[1].fc1.update.U.grad)
    torch.testing.assert_close(found[0], found[1])


def test_no_base_model_after_folds() -> None:
    model = get_peft_model(patched_opt(fold_steps=1), LORA)
    fill_updates(model)
    sync_model(model, 1)
    with model.disable_adapter(), pytest.raises(InactivePatchError, match="fold_steps has folded updates"):
        logits(model)
    assert logits(model).isfinite().all()


def test_merged_adapters_leave_no_switch() -> None:
    model = get_peft_model(patched_opt(), LORA)
    fill_updates(model)
    with model.disable_adapter():
        logits(model)
    merged = model.merge_and_unload().eval()
    with dense_forward(merged):
        expected = logits(merged)
    torch.testing.assert_close(logits(unpatch_model(merged)), expected, rtol=1e-4, atol=1e-5)


# TRL's preference trainers


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return demo_tokenizer(CONTENTS)


def preference_trainer(
    kind: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, **values: Any
) -> Any:
    others = {name: values.pop(name) for name in ("ref_model", "peft_config") if name in values}
    trainer_class, config_class = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    return trainer_class(
        model=model,
        args=config_class(**settings(folder, **{"max_steps": 2, "max_length": 32, **values})),
        train_dataset=pairs(),
        processing_class=copy.deepcopy(tokenizer),
        callbacks=[SubquadCallback()],
        **others,
    )


@pytest.mark.parametrize(
    "reference", ["of its own", "adapters off", "adapters first", "computed before", "copied adapters"]
)
def test_dpo_starts_where_the_policy_is_the_reference(
    reference: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The loss is log 2 then; a sparse policy against a dense reference starts elsewhere."""
    model = patch_model(llama_for(tokenizer), TRAIN)
    more: dict[str, Any] = {"ref_model": llama_for(tokenizer)}
    if reference == "adapters off":
        more = {"peft_config": LORA}
    elif reference == "adapters first":
        more = {}
        model = patch_model(get_peft_model(unpatch_model(model), LORA), TRAIN)
    elif reference == "computed before":
        more["precompute_ref_log_probs"] = True
    elif reference == "copied adapters":  # TRL compares with a copy of the adapters, named "ref"
        adapted = get_peft_model(unpatch_model(model), LORA)
        fill = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=fill)
        adapted.save_pretrained(tmp_path / "adapters")
        model = PeftModel.from_pretrained(
            patch_model(llama_for(tokenizer), TRAIN), tmp_path / "adapters", is_trainable=True
        )
        more = {}
    before = factors(model)
    run = preference_trainer("DPO", model, tokenizer, tmp_path, **more)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[1] < losses[0] - 1e-3
    assert all(not torch.equal(before[name], value) for name, value in factors(run.model).items())
    assert not any(mlp.calls for mlp in sparse_mlps(run.model))


def test_a_sparse_policy_would_start_elsewhere(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    monkeypatch.setattr("hf_subquad.training.callback.compares_with_reference", lambda args: False)
    model = patch_model(llama_for(tokenizer), SubquadConfig(**{**TRAIN.to_dict(), "active": 0.1}))
    run = preference_trainer("DPO", model, tokenizer, tmp_path, ref_model=llama_for(tokenizer), max_steps=1)
    run.train()
    assert run.state.log_history[0]["loss"] != pytest.approx(math.log(2), abs=1e-3)


def test_a_reference_that_follows_the_policy_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(InactivePatchError, match="sync_ref_model"):
        preference_trainer("DPO", patch_model(llama_for(tokenizer), TRAIN), tokenizer, tmp_path, sync_ref_model=True,
                           ref_model=llama_for(tokenizer))  # fmt: skip


@pytest.mark.parametrize("kind", ["SFT", "Reward"])
def test_losses_of_one_pass_run_sparse(kind: str, tmp_path: Path) -> None:
    from hf_subquad.training.unsupported_engines import compares_with_reference

    config = getattr(trl, f"{kind}Config")(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    assert not compares_with_reference(config)
    assert compares_with_reference(trl.KTOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[]))


@pytest.mark.parametrize("active", [0.5, None])
def test_grpo(active: float | None, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = patch_model(llama_for(tokenizer), SubquadConfig(**{**TRAIN.to_dict(), "active": active}))
    before = factors(model)
    args = trl.GRPOConfig(**settings(tmp_path, max_steps=1, num_generations=4, max_completion_length=6))
    run = trl.GRPOTrainer(
        model=model, args=args, train_dataset=pairs().select_columns(["prompt"]), processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(hash(text) % 7) for text in completions],
        callbacks=[SubquadCallback()],
    )  # fmt: skip
    run.train()
    assert any(not torch.equal(before[name], value) for name, value in factors(run.model).items())
