"""What both scripts share: loading, TrainingArguments, evaluation, and writing what comes out."""

import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from data import DataError
from methods import plain_model
from settings import Settings, SettingsError
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_subquad import last_whole_checkpoint, save_merged
from hf_subquad.errors import SubquadError

# What TrainingArguments gets unless the YAML says otherwise.
TRAINING_DEFAULTS: dict[str, Any] = {
    "optim": "adamw_torch_fused",
    "eval_strategy": "steps",
    "report_to": "none",
    "label_names": ["labels"],  # the Trainer cannot see them through a PeftModel
    "ddp_find_unused_parameters": False,  # every trained weight is used in every step
}


def run_script(main: Callable[[], object]) -> None:
    """Run `main`; a mistake of the user ends in one line, anything else in a traceback."""
    try:
        main()
    except (SettingsError, DataError, SubquadError) as error:
        sys.exit(f"error: {error}")


def load_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token (EOS where it has none; padding carries no loss).

    Raises:
        SettingsError: `model` is a path and there is nothing, or there is no token to pad with.
    """
    path = Path(settings.model)
    if settings.model.startswith((".", "/", "~")) and not path.is_dir():
        raise SettingsError(f"model: there is no folder {path} (seen from {Path.cwd()})")
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise SettingsError(f"the tokenizer of {settings.model} has neither a padding nor an EOS token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_options(settings: Settings) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`."""
    return {"dtype": getattr(torch, settings.dtype), "attn_implementation": "sdpa"}


def check_max_length(settings: Settings, config: Any) -> None:
    """Raises SettingsError if the model has fewer positions than `max_length`."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and settings.max_length > positions:
        raise SettingsError(f"max_length: {settings.max_length} exceeds the model's {positions} positions")


def training_arguments(settings: Settings, **more: Any) -> TrainingArguments:
    """TrainingArguments of the settings. `more` is what the script itself has to say."""
    # transformers refuses bf16 on a processor unless use_cpu is set, and does not read that from accelerate's config.
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    on_cpu = {"use_cpu": use_cpu, "dataloader_pin_memory": not use_cpu}
    values = TRAINING_DEFAULTS | on_cpu | _checkpointing(settings) | more | settings.training
    return TrainingArguments(output_dir=settings.output_dir, seed=settings.seed, **values)


def _checkpointing(settings: Settings) -> dict[str, Any]:
    if not settings.gradient_checkpointing:
        return {}
    # transformers 5 renames gradient_checkpointing on the way. Not reentrant: the reentrant kind needs inputs
    # with gradients, which a model with frozen embeddings does not have.
    names = {f.name for f in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def checkpoint_to_resume(settings: Settings) -> str | None:
    """The checkpoint folder to go on from, or None for a fresh start.

    Raises:
        SettingsError: there is no such checkpoint.
    """
    wanted = settings.resume_from_checkpoint
    if wanted is False:
        return None
    folder = Path(settings.output_dir)
    found = wanted if isinstance(wanted, str) else _newest_checkpoint(folder, settings.method)
    if found is None or not Path(found).is_dir():
        raise SettingsError(f"resume_from_checkpoint: {wanted}: no whole checkpoint in {found or folder}")
    return found


def _newest_checkpoint(folder: Path, method: str) -> str | None:
    if not folder.is_dir():
        return None
    return last_whole_checkpoint(folder) if method == "subquad" else get_last_checkpoint(folder)


def say(arguments: TrainingArguments, text: str) -> None:
    """Print on the main process only."""
    if arguments.process_index == 0:
        print(text, flush=True)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of weights: all of them, and those that are trained. Count before adapters are merged."""
    weights = list(model.parameters())
    return {
        "parameters": sum(weight.numel() for weight in weights),
        "trained_parameters": sum(weight.numel() for weight in weights if weight.requires_grad),
    }


def describe_parameters(counts: dict[str, int], method: str) -> str:
    trained, total = counts["trained_parameters"], counts["parameters"]
    return f"method {method}: {trained:,} of {total:,} parameters are trained ({trained / total:.2%})"


def evaluate(trainer: Trainer, method: str) -> dict[str, Any]:
    """Final evaluation. `eval_loss_dense` is the loss of the model that is saved; for "subquad",
    `eval_loss_sparse` is the loss of the approximation that was trained with, else None.

    The loss is the mean over batches of the mean over each batch's tokens, as the Trainer computes it.
    """
    if method != "subquad":
        metrics = trainer.evaluate()
        return {**_scores(metrics, "eval"), "eval_loss_dense": metrics["eval_loss"], "eval_loss_sparse": None}
    from hf_subquad import dense_forward, sparse_forward

    with dense_forward(trainer.model):
        dense = trainer.evaluate()
    with sparse_forward(trainer.model):
        sparse = trainer.evaluate(metric_key_prefix="eval_sparse")
    return {
        **_scores(dense, "eval"),
        "eval_loss_dense": dense["eval_loss"],
        "eval_loss_sparse": sparse["eval_sparse_loss"],
    }


def save_plain(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, use_cache: bool) -> Path:
    """Write the trained model as a plain Hugging Face checkpoint to OUTPUT_DIR/final.

    Ends the training, since adapters are merged. Only the main process writes; all wait for it.

    Args:
        use_cache: the loaded config's value, put back because the Trainer switches it off while training.
    """
    folder = Path(trainer.args.output_dir) / "final"
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = use_cache
    if trainer.is_fsdp_enabled:  # all ranks give their shards
        save_merged(model, folder)
    if trainer.is_world_process_zero():
        if not trainer.is_fsdp_enabled:
            plain_model(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()
    return folder


def write_results(
    trainer: Trainer, settings: Settings, train_metrics: dict[str, Any], scores: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Scores, loss curve, settings, versions and machine; the main process writes OUTPUT_DIR/results.json."""
    results = {
        "method": settings.method,
        "model": settings.model,
        **scores,
        "steps": trainer.state.global_step,
        "train_loss": train_metrics["train_loss"],
        "train_seconds": train_metrics["train_runtime"],  # evaluations and checkpoints included
        "checkpoint": str(folder),
        "processes": trainer.args.world_size,
        "device": _device_name(trainer.args.device),
        "versions": {name: _version(name) for name in ("hf-subquad", "torch", "transformers", "accelerate", "peft")},
        "settings": asdict(settings),
        "log": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        path = Path(settings.output_dir) / "results.json"
        unfinished = path.with_suffix(".json.tmp")
        unfinished.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    return results


def describe_results(results: dict[str, Any]) -> str:
    lines = [f"eval loss (dense): {results['eval_loss_dense']:.4f}"]
    if results["eval_loss_sparse"] is not None:
        lines.append(f"eval loss (sparse): {results['eval_loss_sparse']:.4f}")
    if "eval_accuracy" in results:
        lines.append(f"eval accuracy (dense): {results['eval_accuracy']:.4f}")
    lines.append(f"plain checkpoint: {results['checkpoint']}")
    return "\n".join(lines)


def _scores(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """Metrics that the script computes itself, such as eval_accuracy."""
    known = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    ours = {f"{prefix}_{name}" for name in known}
    return {key: value for key, value in metrics.items() if key.startswith(f"{prefix}_") and key not in ours}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree
        return None
