"""The three ways to fine-tune that the recipes compare: one function in, one function out.

`apply_method` turns a loaded model into one ready for the Trainer; `plain_model` turns it back into a model
whose `save_pretrained` writes a checkpoint that loads without this library and without PEFT.
"""

from typing import Any, Literal

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from hf_subquad.config import SubquadConfig

Method = Literal["vanilla", "lora", "subquad"]
Rest = Literal["lora", "frozen", "full"]

# Attribute names of the fresh heads of AutoModelForSequenceClassification; PEFT trains the same two.
CLASSIFIER_HEADS = ("classifier", "score")


def apply_method(
    model: PreTrainedModel,
    method: Method,
    *,
    rank: int = 16,
    alpha: float = 16.0,
    subquad: SubquadConfig | None = None,
    rest: Rest = "lora",
    plan: str | None = None,
    task_type: str = "CAUSAL_LM",
) -> tuple[nn.Module, list[TrainerCallback]]:
    """Prepare `model` for fine-tuning by `method`. Call it before the Trainer is made.

    Args:
        model: a loaded model; it is changed in place.
        method: "vanilla" trains every weight; "lora" trains PEFT adapters on all linear layers; "subquad"
            patches the MLPs and gives everything else the treatment `rest`.
        rank, alpha: of the LoRA adapters, and of the updates U V where `subquad` is not given.
        subquad: settings of the sparse layers; by default `SubquadConfig(rank=rank, alpha=alpha)`.
        rest: for "subquad", what is not patched: "lora" puts adapters on the remaining linear layers as
            method "lora" does, "frozen" trains U and V only, "full" trains all that is not patched.
        plan: for "subquad", path of a plan in JSON; without one the callback plans, unless `active` is fixed.
        task_type: PEFT's name of the task: "CAUSAL_LM" or "SEQ_CLS". For "SEQ_CLS" the fresh classification
            head is always trained, even where the rest is frozen.

    Returns:
        The model for the Trainer (a `PeftModel` where adapters were added) and the callbacks it needs.

    Raises:
        ValueError: an unknown `method` or `rest`.
        hf_subquad.errors.PatchError: "subquad" found nothing to patch.
        hf_subquad.errors.PlanError: the plan is damaged, or for another model.
    """
    if method == "vanilla":
        return model, []
    if method == "lora":
        return _add_lora(model, rank, alpha, task_type), []
    if method == "subquad":
        return _patch(model, subquad or SubquadConfig(rank=rank, alpha=alpha), rank, alpha, rest, plan, task_type)
    raise ValueError(f"method must be 'vanilla', 'lora' or 'subquad', got {method!r}")


def plain_model(model: nn.Module) -> PreTrainedModel:
    """The model whose `save_pretrained` writes a plain Hugging Face checkpoint.

    PEFT adapters are merged into the weights and removed, in place: call it when training is over. Patched
    layers need nothing: they merge U V into what they save.
    """
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def _add_lora(model: PreTrainedModel, rank: int, alpha: float, task_type: str) -> PeftModel:
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type=task_type)
    return get_peft_model(model, config)


def _patch(
    model: PreTrainedModel,
    config: SubquadConfig,
    rank: int,
    alpha: float,
    rest: Rest,
    plan: str | None,
    task_type: str,
) -> tuple[nn.Module, list[TrainerCallback]]:
    from hf_subquad import Plan, SubquadCallback, patch_model

    if rest not in ("lora", "frozen", "full"):
        raise ValueError(f"rest must be 'lora', 'frozen' or 'full', got {rest!r}")
    names_before = {name for name, _ in model.named_parameters()}
    result: Any = patch_model(model, config, Plan.load(plan) if plan else None)
    factors = [weight for name, weight in result.named_parameters() if name not in names_before]
    if rest == "frozen":
        _freeze(result, keep_head=task_type == "SEQ_CLS")
    elif rest == "lora":
        result = _add_lora(result, rank, alpha, task_type)
    for factor in factors:  # PEFT and _freeze have just frozen U and V with everything else
        factor.requires_grad_(True)
    return result, [SubquadCallback()]


def _freeze(model: nn.Module, keep_head: bool) -> None:
    for name, weight in model.named_parameters():
        weight.requires_grad_(keep_head and name.startswith(CLASSIFIER_HEADS))
