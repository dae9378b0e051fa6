"""Does TRL's `SFTTrainer` train a patched model, with the settings it adds to the Trainer's?"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.models import tokens
from helpers.training import TRAIN, factors
from helpers.trl_runs import demo_tokenizer, llama_for, settings
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_subquad import SubquadCallback, SubquadConfig, patch_model, sparse_mlps

trl = pytest.importorskip("trl")

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
LORA = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return demo_tokenizer(TEMPLATE)


def rows(kind: str) -> Dataset:
    """Prose, prompts with completions, or conversations: a dozen rows of different lengths."""
    pairs = [(f"What is {i} times {i}?", f" It is {'indeed ' * (i % 4)}{i * i}.") for i in range(12)]
    if kind == "text":
        return Dataset.from_dict({"text": [question + answer for question, answer in pairs]})
    if kind == "completion":
        return Dataset.from_dict({"prompt": [q for q, _ in pairs], "completion": [a for _, a in pairs]})
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    return Dataset.from_dict({"messages": chats})


def sft_trainer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    kind: str = "text",
    peft: Any = None,
    **values: Any,
) -> Any:
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings(folder, **{"max_steps": 3, "max_length": 32, **values})),
        train_dataset=rows(kind),
        processing_class=copy.deepcopy(tokenizer),
        peft_config=peft,
        callbacks=[SubquadCallback()],
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "text": {},
    "packed": {"packing": True},
    "packed over the edges of rows": {"packing": True, "packing_strategy": "wrapped"},
    "no padding": {"padding_free": True, "max_length": None},
    "completions only": {"kind": "completion"},
    "answers only": {"kind": "chat", "assistant_only_loss": True},
    "noisy embeddings": {"neftune_noise_alpha": 5.0},
    "bf16": {"bf16": True},
    "LoRA on attention": {"peft": LORA},
}
FAST = ("text", "packed", "answers only", "LoRA on attention")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SETTINGS])
def test_trains_the_updates_and_leaves_what_it_holds(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = patch_model(llama_for(tokenizer), TRAIN)
    before = factors(model)
    run = sft_trainer(model, tokenizer, tmp_path, **SETTINGS[name])
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 3 and all(0 < entry["subquad/active_share"] < 1 for entry in logged)
    assert all(mlp.calls >= 3 for mlp in sparse_mlps(run.model))
    assert all(not torch.equal(before[key], value) for key, value in factors(run.model).items())

    trained = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False).eval()
    expected = trained(input_ids=tokens()).logits.detach()
    if "peft" in SETTINGS[name]:
        trained.merge_and_unload().save_pretrained(tmp_path / "out")
    else:
        run.save_model(str(tmp_path / "out"))
    plain = type(model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(plain(tokens()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_plans_on_its_batches(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = patch_model(llama_for(tokenizer), SubquadConfig(rank=3, tile_size=5, sketch_rank=12))
    sft_trainer(model, tokenizer, tmp_path, kind="completion").train()
    assert (tmp_path / "subquad_plan.json").is_file()
