"""Section `step`: steps of the Trainer on some layers of a large model, fine-tuned in three ways, in turns."""

import copy
import gc
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from comparison.run_settings import RunSettings
from comparison.training_clock import TimedTrainer
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback, default_data_collator

from hf_subquad import SubquadCallback, SubquadConfig, patch_model, sparse_mlps

from .bench import Bench, Case, Row, dtype_name


@dataclass(frozen=True)
class Work:
    """A slice of Llama-3-8B, and how it is trained."""

    layers: int = 4
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    key_value_heads: int = 8
    batch_size: int = 8
    seq_length: int = 1024
    rounds: int = 3
    steps: int = 5  # timed, in a turn
    untimed: int = 2  # first steps of a turn


FULL = Work()
TINY = Work(1, 32, 96, 2, 2, 2, 12, 1, 1, 1)

METHODS = {
    "subquad": "sparse MLPs, PEFT LoRA on attention",
    "lora": "PEFT LoRA on all linear layers",
    "vanilla": "full fine-tuning",
    "lora_same_dtype": "PEFT LoRA on all linear layers, adapters in the model's dtype instead of fp32",
}


@dataclass
class Candidate:
    """A prepared model.

    Attributes:
        held_bytes: of device memory, without gradients and optimizer; None on a CPU.
        prepared_seconds: patching or adding adapters.
    """

    model: nn.Module
    callbacks: list[TrainerCallback]
    note: str = ""
    held_bytes: int | None = None
    prepared_seconds: float = 0.0


class _Alone:
    """In place of turns with other processes: here Trainers take turns within one."""

    round = 0
    shared: dict[str, Any] = {}  # noqa: RUF012

    def wait(self, *_: Any) -> None:
        pass


def cases(bench: Bench) -> list[Case]:
    """Each turn of each method is a case: one that fails leaves the others."""
    found: list[Case] = []
    for number in range(_work(bench).rounds):
        names = list(METHODS)
        for name in names[number % len(names) :] + names[: number % len(names)]:  # nobody always follows the same
            found.append((f"{name}, round {number}", partial(_turn, bench, name, number)))
    return found


def _turn(bench: Bench, method: str, number: int) -> Iterator[Row]:
    work = _work(bench)
    about = {
        "what": "Trainer steps", "method": method, "how": METHODS[method], "round": number, "layers": work.layers,
        "hidden": work.hidden, "intermediate": work.intermediate, "vocabulary": bench.vocabulary,
        "batch": f"{work.batch_size} x {work.seq_length}", "dtype": dtype_name(bench.dtype),
    }  # fmt: skip
    if method.startswith("lora") and not peft_installed():
        yield {**about, "note": "peft is not installed"}
        return
    each = bench.once(f"candidate {method}", lambda: candidate(bench, method))
    before = _allocated(bench)
    trainer = train(bench, each, work.untimed + work.steps, [])
    yield {
        **about,
        "note": each.note,
        "ms": [1000 * row["seconds"] for row in trainer.measured.steps[work.untimed :]],
        # What the other models hold does not count.
        "peak_bytes": None if before is None else trainer.memory.bytes - before + each.held_bytes,
        "trained_parameters": sum(w.numel() for w in each.model.parameters() if w.requires_grad),
        "prepared_seconds": each.prepared_seconds,
    }


def _work(bench: Bench) -> Work:
    return TINY if bench.tiny else FULL


def _allocated(bench: Bench) -> int | None:
    gc.collect()
    return torch.cuda.memory_allocated() if bench.on_gpu else None


def train(bench: Bench, each: Candidate, steps: int, callbacks: list[TrainerCallback]) -> TimedTrainer:
    """Train for so many steps, with an optimizer of its own; what trained, done."""
    work = _work(bench)
    settings = RunSettings(
        method="subquad", learning_rate=1e-5, steps=steps, batch_size=work.batch_size, seq_length=work.seq_length,
        device="cuda" if bench.on_gpu else "cpu", turn_steps=steps,
    )  # fmt: skip
    gc.collect()  # a Trainer and its optimizer refer to each other
    if bench.on_gpu:
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = TimedTrainer(
            each.model, settings, _Alone(), _rows(bench, work, steps), default_data_collator,
            [*each.callbacks, *callbacks], scratch,
        )  # fmt: skip
        trainer.train()
    each.model.zero_grad(set_to_none=True)
    return trainer


def candidate(bench: Bench, method: str) -> Candidate:
    transformers.utils.logging.set_verbosity_error()
    base = bench.once("slice", lambda: _slice(bench, _work(bench)))
    before = _allocated(bench)
    model = copy.deepcopy(base)
    started = time.perf_counter()
    each = _prepared(bench, method, model)
    bench.clock.wait()
    each.prepared_seconds = time.perf_counter() - started
    each.held_bytes = None if before is None else _allocated(bench) - before
    return each


def _prepared(bench: Bench, method: str, model: nn.Module) -> Candidate:
    rank = bench.sizes.rank
    if method == "vanilla":
        return Candidate(model, [])
    if method == "lora":
        return Candidate(_with_lora(model, rank), [])
    if method == "lora_same_dtype":
        return Candidate(_with_lora(model, rank, autocast_adapter_dtype=False), [])
    # Its first layer stands for one from the middle of the model, so all are patched.
    neurons = model.config.intermediate_size
    config = SubquadConfig(
        rank=rank, active=SubquadConfig().active_neurons(neurons), tile_size=bench.sizes.tile, backend="triton",
        layers_to_transform="all",
    )  # fmt: skip
    patch_model(model, config)
    note = f"{sparse_mlps(model)[0].k} of {neurons} neurons in every MLP; with compensation, as the callback fits it"
    if peft_installed():
        return Candidate(_with_lora(model, rank), [SubquadCallback()], note)
    for name, weight in model.named_parameters():
        weight.requires_grad_(".update." in name)
    return Candidate(model, [SubquadCallback()], f"{note}; attention frozen, as peft is not installed")


def peft_installed() -> bool:
    return importlib.util.find_spec("peft") is not None


def _with_lora(model: nn.Module, rank: int, **options: Any) -> nn.Module:
    """Adapters on all linear layers that are not patched, as in the recipes."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=float(rank), lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config, **options)


def _slice(bench: Bench, work: Work) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=bench.vocabulary, hidden_size=work.hidden, intermediate_size=work.intermediate,
        num_hidden_layers=work.layers, num_attention_heads=work.heads, num_key_value_heads=work.key_value_heads,
        max_position_embeddings=work.seq_length, use_cache=False,
    )  # fmt: skip
    with torch.device(bench.device):
        return AutoModelForCausalLM.from_config(config, dtype=bench.dtype, attn_implementation="sdpa")


def _rows(bench: Bench, work: Work, steps: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (steps * work.batch_size, work.seq_length)
    # The first ids are the special ones.
    ids = torch.randint(min(4, bench.vocabulary - 1), bench.vocabulary, shape, generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
