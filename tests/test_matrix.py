"""Every common trainer with every way to put adapters beside the patch: three steps, a save, and the plain model again.

What is saved must load without the library and compute what the live model computes, evaluated dense.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.models import build, tokens
from helpers.training import TRAIN, factors
from helpers.trl_runs import CONTENTS, demo_tokenizer, llama_for, pairs, settings
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_subquad import (
    SubquadCallback,
    SubquadConfig,
    apply_plan,
    calibrate,
    check_active,
    compensate,
    patch_model,
    save_merged,
    sparse_mlps,
    sync_model,
)

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.slow

ADAPTERS = ("plain", "PEFT before", "PEFT after", "add_adapter")
STEPS = 3

Run = Callable[[nn.Module, PreTrainedTokenizerBase, Path], nn.Module]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return demo_tokenizer(CONTENTS)


def arguments(arguments_class: Any, folder: Path, **more: Any) -> Any:
    saving = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": STEPS}
    return arguments_class(**settings(folder, **saving, gradient_checkpointing=False, **more))


def texts() -> list[dict[str, Tensor]]:
    rows = [tokens(seed, (9,)) for seed in range(16)]
    return [{"input_ids": row, "labels": row} for row in rows]


def by_trainer(trainer_class: Any, arguments_class: Any) -> Run:
    def run(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> nn.Module:
        made = trainer_class(model=model, args=arguments(arguments_class, folder), train_dataset=texts(),
                             callbacks=[SubquadCallback()])  # fmt: skip
        made.train()
        return made.model

    return run


def by_trl(kind: str, columns: list[str] | None = None, rename: dict[str, str] | None = None, **more: Any) -> Run:
    def run(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> nn.Module:
        data = pairs().select_columns(columns) if columns else pairs()
        others = {}
        if kind == "DPO" and not hasattr(model, "get_base_model"):
            others["ref_model"] = llama_for(tokenizer)
        if kind == "GRPO":
            others["reward_funcs"] = lambda completions, **_: [float(len(text) % 7) for text in completions]
        args = arguments(getattr(trl, f"{kind}Config"), folder, **more)
        made = getattr(trl, f"{kind}Trainer")(
            model=model, args=args, processing_class=copy.deepcopy(tokenizer),
            train_dataset=data.rename_columns(rename or {}), callbacks=[SubquadCallback()], **others,
        )  # fmt: skip
        made.train()
        return made.model

    return run


def by_loop(accelerated: bool) -> Run:
    def run(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> nn.Module:
        batches = list(DataLoader(texts(), 4, collate_fn=default_data_collator))
        for mlp in sparse_mlps(model):
            for projection in mlp.projections:
                projection.update.requires_grad_(True)
        if sparse_mlps(model)[0].runtime.config.active is None:
            apply_plan(model, calibrate(model, batches[:2]))
        compensate(model, batches[:2])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        check_active(model, optimizer)
        wrapped, backward = model, Tensor.backward
        if accelerated:
            accelerator = Accelerator(cpu=True)
            wrapped, optimizer = accelerator.prepare(model, optimizer)
            backward = accelerator.backward
        sync_model(model, 0)
        for step in range(1, STEPS + 1):
            backward(wrapped(**batches[step]).loss)
            optimizer.step()
            optimizer.zero_grad()
            sync_model(model, step, optimizer)
        return model

    return run


RUNS: dict[str, Run] = {
    "Trainer": by_trainer(Trainer, TrainingArguments),
    "Seq2Seq": by_trainer(Seq2SeqTrainer, Seq2SeqTrainingArguments),
    "SFT": by_trl("SFT", ["prompt", "chosen"], {"chosen": "completion"}, max_length=32),
    "DPO": by_trl("DPO", max_length=32),
    "Reward": by_trl("Reward", max_length=32),
    "GRPO": by_trl("GRPO", ["prompt"], num_generations=4, max_completion_length=6),
    "accelerate": by_loop(True),
    "loop": by_loop(False),
}


def model_for(run: str, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    if run == "Seq2Seq":
        return build("t5")
    if run == "Reward":
        from transformers import LlamaForSequenceClassification

        config = llama_for(tokenizer).config
        config.num_labels = 1
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForSequenceClassification(config)
    return llama_for(tokenizer)


def with_adapters(model: nn.Module, adapters: str, config: SubquadConfig, run: str) -> nn.Module:
    targets = ["q", "v"] if run == "Seq2Seq" else ["q_proj", "v_proj"]
    task = {"Seq2Seq": "SEQ_2_SEQ_LM", "Reward": "SEQ_CLS"}.get(run, "CAUSAL_LM")
    lora = LoraConfig(task_type=task, r=2, target_modules=targets)
    if adapters == "PEFT before":
        return patch_model(get_peft_model(model, lora), config)
    model = patch_model(model, config)
    if adapters == "PEFT after":
        return get_peft_model(model, lora)
    if adapters == "add_adapter":
        model.add_adapter(lora)
    return model


def inputs(run: str) -> dict[str, Tensor]:
    ids = tokens(3)
    return {"input_ids": ids, "decoder_input_ids": tokens(4)} if run == "Seq2Seq" else {"input_ids": ids}


@pytest.mark.parametrize("budgets", ["fixed", "planned"])
@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("run", RUNS)
def test_trains_saves_and_comes_back_plain(
    run: str, adapters: str, budgets: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    config = SubquadConfig(**{**TRAIN.to_dict(), "active": 0.5 if budgets == "fixed" else None})
    base = model_for(run, tokenizer)
    plain_class = type(base)
    model = with_adapters(base, adapters, config, run)
    before = factors(model)
    trained = RUNS[run](model, tokenizer, tmp_path / "run").eval()
    moved = [not torch.equal(before[name], value) for name, value in factors(trained).items()]
    assert any(moved) if run == "GRPO" else all(moved)
    with torch.no_grad():
        expected = trained(**inputs(run)).logits
    if adapters == "plain":
        trained.save_pretrained(tmp_path / "out")
    else:
        save_merged(trained, tmp_path / "out")
    again, info = plain_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs(run)).logits, expected, rtol=1e-4, atol=1e-5)
