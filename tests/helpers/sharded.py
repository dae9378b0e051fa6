"""Custom loops that two processes under FSDP2, or one that takes their micro-batches in turn, must end alike."""

import gc
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from hf_subquad import (
    SubquadConfig,
    apply_plan,
    compensate,
    dense_forward,
    merged_named_weights,
    patch_model,
    sparse_mlps,
    sync_model,
)
from hf_subquad.layers.patched_mlps import runtime_of
from hf_subquad.weights.shards import gathered, whole

from .models import NEURONS, build, checkpoint_activations, tokens
from .planning import budgets_of, hand_plan
from .training import TRAIN, factors

STEPS, RANKS = 20, 2
KNOWN_ACCELERATE = Version(accelerate.__version__) >= Version("1.15")  # older ones shard embeddings and heads otherwise

# Family, settings of the patch, and what else is special.
SCENARIOS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "folds, audits, dense steps": ("opt", {"fold_steps": 6, "refresh_steps": 4, "dense_share": 0.2}, set()),
    # Without audits, which in one process see one micro-batch of the two.
    "classes": ("llama", {"active": None, "fold_steps": 9, "refresh_steps": 0}, {"plan", "checkpointing"}),
    "kept gathered": ("llama", {"fold_steps": 3, "refresh_steps": 0}, {"evaluation", "root only"}),
    "Conv1D": ("gpt2", {"fold_steps": 7, "refresh_steps": 3}, set()),
    "PEFT": ("llama", {"fold_steps": 8, "refresh_steps": 5}, {"LoRA"}),
}


def micro_batch(step: int, part: int) -> dict[str, Tensor]:
    """Two rows with a prompt, the second one padded; the same again every four steps."""
    ids, mask = tokens(RANKS * (step % 4) + part, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    labels = ids.clone()
    labels[:, :4] = -100
    mask[1, -2:], labels[1, -2:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def patched(name: str) -> nn.Module:
    family, config, more = SCENARIOS[name]
    model = patch_model(build(family), SubquadConfig(**{**TRAIN.to_dict(), **config}))
    if "plan" in more:
        apply_plan(model, hand_plan(model, [(NEURONS, 13), (39, 0)], gradient=0.9))
    compensate(model, [micro_batch(-1, 0), micro_batch(-1, 1)])
    if "checkpointing" in more:
        checkpoint_activations(model, False)
    if "LoRA" in more:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or ".update." in key)
    return model


def shard(model: nn.Module, mesh: DeviceMesh, root_only: bool = False, **settings: Any) -> nn.Module:
    """As a script would: every decoder layer, then the rest."""
    for module in [] if root_only else list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def run(name: str, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Train by a scenario, sharded over a mesh or in one process, and return what must be alike."""
    more = SCENARIOS[name][2]
    model = patched(name)
    if mesh is not None:
        shard(model, mesh, "root only" in more)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    sync_model(model, 0, optimizer)
    parts = range(RANKS) if mesh is None else [dist.get_rank()]
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(1, STEPS + 1):
        loss = torch.zeros(())
        for part in parts:
            one = model(**micro_batch(step, part)).loss / len(parts)
            torch.manual_seed(RANKS * step + part)  # each rank samples rows of its own micro-batch
            one.backward()
            loss += one.detach()
        if mesh is not None:
            dist.all_reduce(loss.div_(RANKS))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        found["losses"].append(loss.item())
        found["norms"].append(whole(norm).item())
        if step == STEPS:
            found["gradients"] = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        if "evaluation" in more:
            with torch.no_grad():
                model.eval()(**micro_batch(0, 0))
            model.train()
        sync_model(model, step, optimizer)
    return {**found, **end(model)}


def end(model: nn.Module) -> dict[str, Any]:
    """Weights, factors and selections of a trained model, and the logits of its dense forward."""
    mlps = sparse_mlps(model)
    weights = {name: value.detach().clone() for name, value in merged_named_weights(model)}
    with dense_forward(model), torch.no_grad():
        logits = model(tokens()).logits
    report = runtime_of(model).last_report
    norm = report.update_norm
    with gathered([projection for mlp in mlps for projection in mlp.projections]):
        return {
            "weights": weights, "logits": logits, "factors": factors(model), "update norm": norm,
            "restarts": [p.update.restarts for mlp in mlps for p in mlp.projections], "budgets": budgets_of(model),
            "codes": [mlp.index.sketch.codes.clone() for mlp in mlps], "audited": (report.recall, report.error),
            "skips padding": runtime_of(model).padding.may_skip,
        }  # fmt: skip


def frozen_bytes(model: nn.Module) -> int:
    """Bytes that this process holds of the base weights."""
    weights = [whole_or_part(p.weight) for mlp in sparse_mlps(model) for p in mlp.projections]
    return sum(weight.untyped_storage().nbytes() for weight in weights)


def whole_or_part(weight: Any) -> Tensor:
    return weight.to_local() if hasattr(weight, "to_local") else weight


def large_tensors(size: int) -> int:
    """Number of storages of at least so many bytes that this process holds, but for those that only a graph holds."""
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter) and not thing.is_meta]
    return len({t.untyped_storage().data_ptr() for t in alive if t.untyped_storage().nbytes() >= size})


def forward(model: nn.Module, inputs: dict[str, Tensor], size: int) -> tuple[Tensor, int]:
    """The loss, and the number of storages of at least so many bytes that its graph holds."""
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    assert len(saved) > 10
    return loss, len({s.data_ptr() for s in saved if s.nbytes() >= size})
