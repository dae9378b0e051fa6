"""The sidecar: what resuming needs beyond a plain checkpoint, such as U and V, in one safetensors file beside it."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..atomic_files import fingerprint, write_atomically
from ..errors import PlanError, SidecarError
from ..layers.budget import TokenClass
from ..layers.compensation import Compensation
from ..layers.patched_mlps import patched_parts, settle_shards
from ..layers.sparse_mlp import SparseMLP
from ..patching.patch import apply_plan
from ..plan import Plan
from ..weights.projection_with_update import NeuronProjection
from .sync_model import named_projections

SIDECAR_NAME = "subquad_state.safetensors"
_FORMAT = 2


def save_sidecar(model: nn.Module, folder: str | os.PathLike[str], step: int) -> Path:
    """Write the sidecar of the checkpoint in `folder`, atomically.

    For a checkpoint with merged weights (every plain one), the factors are enough. For a PEFT checkpoint, which has
    only adapters, the sidecar also holds the base weights if folds change them. Base weights in 4 bits never change:
    load them as before the training.

    Write it last: a checkpoint is complete if it has this file and the other files are unchanged since. Under FSDP2 all
    ranks must call this, and rank 0 writes.

    Raises:
        OutputError: the file could not be written; no partial file is left.
    """
    runtime, mlps = patched_parts(model)
    settle_shards(runtime, mlps)
    in_4bit = any(projection.quantization is not None for _, projection in named_projections(mlps))
    merged = not hasattr(model, "peft_config") and not in_4bit
    path = Path(folder) / SIDECAR_NAME
    tensors: dict[str, Tensor] = {}
    restarts: dict[str, int] = {}
    for mlp in mlps:
        with mlp.index.gathered():
            for name, projection in named_projections([mlp]):
                update = projection.update
                tensors[f"{name}.U"], tensors[f"{name}.V"] = update.U.detach(), update.V.detach()
                tensors[f"{name}.sample"] = projection.sample(live=merged)
                restarts[name] = update.restarts
                if not merged and (update.restarts or runtime.config.fold_steps):
                    tensors[f"{name}.rows"] = projection.rows().contiguous()
        tensors[f"{mlp.name}.norms"] = mlp.index.output_norms
        if mlp.index.summary is not None:
            tensors[f"{mlp.name}.summary"] = mlp.index.summary
        for name, correction in mlp.corrections.items():
            tensors |= {f"{mlp.name}.correction.{name}.{part}": values for part, values in vars(correction).items()}
    if runtime.sharded and dist.is_initialized() and dist.get_rank():
        return path
    # Copies, as corrections may share their basis, and safetensors takes no tensors that share memory.
    tensors = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    about = {
        "format": _FORMAT,
        "step": step,
        "merged": merged,
        "restarts": restarts,
        "folded": runtime.folded,
        "config": runtime.config.to_dict(),
        "plan": runtime.plan.to_dict() if runtime.plan else None,
        "files": _other_files(path.parent),
    }
    text = json.dumps(about, sort_keys=True)
    write_atomically(path, save(tensors, {"subquad": text, "digest": _digest(text, tensors)}))
    return path


def load_sidecar(model: nn.Module, folder: str | os.PathLike[str]) -> int:
    """Restore the factors of a patched model that has loaded the weights of the checkpoint in `folder`.

    Merged weights become base weights again by subtracting the update. They equal those before the save up to rounding
    in the dtype of the weights. In several processes, all ranks must call this.

    Returns:
        The step at which the sidecar was written.

    Raises:
        FileNotFoundError: there is no sidecar.
        SidecarError: it is damaged, or does not belong to these weights. The model is unchanged.
    """
    path = Path(folder) / SIDECAR_NAME
    about, tensors = _read(path)
    runtime, mlps = patched_parts(model)
    projections = dict(named_projections(mlps))
    if set(about["restarts"]) != set(projections):
        raise SidecarError(
            f"{path} holds updates for {sorted(about['restarts'])[:4]}..., the model is patched at "
            f"{sorted(projections)[:4]}...: patch the same layers as in the run that wrote it"
        )
    for setting in ("rank", "alpha"):
        written = about["config"][setting]
        if written != getattr(runtime.config, setting):
            raise SidecarError(f"{path} was written with {setting}={written}: use the {setting} of that run")
    if odd := _unexpected(mlps, set(tensors)):
        raise SidecarError(f"{path} is not what this version writes; it differs in {odd[:4]}: {_REMEDY}")
    spoiled = sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())
    if spoiled:
        raise SidecarError(f"{path} holds NaN or infinite values in {spoiled[:4]}, training had diverged: {_REMEDY}")
    settle_shards(runtime, mlps)
    for mlp in mlps:
        with mlp.index.gathered():
            for name, projection in named_projections([mlp]):
                if not _fits(name, projection, tensors, about["merged"]):
                    raise SidecarError(f"{path} does not belong to the weights of the model: {name} differs")
    if about.get("plan"):
        try:
            apply_plan(model, Plan.from_dict(about["plan"]))  # which drops corrections
        except PlanError as error:
            raise SidecarError(f"{path}: its plan does not fit: {error}") from error
    for mlp in mlps:
        device = mlp.output.weight.device
        summary = tensors.get(f"{mlp.name}.summary")
        with torch.no_grad(), mlp.index.gathered():
            for name, projection in named_projections([mlp]):
                update, whole = projection.update, projection.merged_rows()
                update.U.copy_(tensors[f"{name}.U"])
                update.V.copy_(tensors[f"{name}.V"])
                update.restarts = about["restarts"][name]
                projection.moments_are_stale = False
                if about["merged"]:
                    projection.set_rows(update.added_to(whole, sign=-1))
                elif f"{name}.rows" in tensors:
                    projection.set_rows(tensors[f"{name}.rows"].to(device))
            mlp.index.adopt(None if summary is None else summary.to(device))
        mlp.index.output_norms = tensors[f"{mlp.name}.norms"].to(device)
        mlp.corrections = {
            token_class: Compensation(*(tensors[name] for name in names)).to(device)
            for token_class, names in _correction_names(mlp).items()
            if names[0] in tensors
        }
    runtime.synced_step = about["step"]
    runtime.folded = about.get("folded", any(about["restarts"].values()))
    return about["step"]


def is_whole(folder: str | os.PathLike[str]) -> bool:
    """Whether the other files of a checkpoint are unchanged since its sidecar was written, after all of them.

    False after an interruption, including one while an older checkpoint of that name was being overwritten or deleted.
    """
    path = Path(folder) / SIDECAR_NAME
    try:
        about, _ = _read(path)
    except (FileNotFoundError, SidecarError):
        return False
    found = _other_files(path.parent)
    return all(found.get(name) == digest for name, digest in about.get("files", {}).items())


def _other_files(folder: Path) -> dict[str, str]:
    """Fingerprint of every other file in a checkpoint, by its path there."""
    files = (path for path in sorted(folder.rglob("[!.]*")) if path.is_file() and path.name != SIDECAR_NAME)
    return {path.relative_to(folder).as_posix(): fingerprint(path) for path in files}


def _correction_names(mlp: SparseMLP) -> dict[TokenClass, list[str]]:
    """Names of the tensors of each class's correction."""
    parts = [part.name for part in dataclasses.fields(Compensation)]
    return {name: [f"{mlp.name}.correction.{name}.{part}" for part in parts] for name in get_args(TokenClass)}


def _unexpected(mlps: Sequence[SparseMLP], found: set[str]) -> list[str]:
    """Names of tensors that are missing or too many."""
    projections = [name for name, _ in named_projections(mlps)]
    wanted = {f"{name}.{part}" for name in projections for part in ("U", "V", "sample")}
    for mlp in mlps:
        wanted |= {f"{mlp.name}.norms"} | ({f"{mlp.name}.summary"} & found)
        wanted |= {name for names in _correction_names(mlp).values() if found.intersection(names) for name in names}
    return sorted((wanted ^ found) - {f"{name}.rows" for name in projections})


def _fits(name: str, projection: NeuronProjection, tensors: dict[str, Tensor], merged: bool) -> bool:
    """Whether what a sidecar holds under a name is of this projection."""
    factors = projection.update.named_parameters()
    if any(tensors[f"{name}.{factor}"].shape != there.shape for factor, there in factors):
        return False
    if f"{name}.rows" in tensors:
        return True
    expected, found = tensors[f"{name}.sample"], projection.sample(live=merged).cpu()
    tolerance = 4 * torch.finfo(projection.dtype).eps
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=tolerance, atol=tolerance * 1e-3)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Contents of a sidecar, checked against its digest."""
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(metadata["subquad"])
        whole = metadata["digest"] == _digest(metadata["subquad"], tensors)
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
        raise SidecarError(f"{path} cannot be read ({type(error).__name__}: {error}): {_REMEDY}") from error
    if not whole:
        raise SidecarError(f"{path} is damaged (its checksum does not match): {_REMEDY}")
    if about["format"] != _FORMAT:
        raise SidecarError(f"{path} has format {about['format']}, this version reads {_FORMAT}")
    return about, tensors


_REMEDY = (
    "resume from another checkpoint (last_whole_checkpoint finds the newest complete one), or load the weights of this "
    "one with from_pretrained and start a new run"
)


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the metadata and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
