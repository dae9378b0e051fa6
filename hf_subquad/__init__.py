"""Subquadratic fine-tuning of wide MLP layers for Hugging Face models."""

from .callback import SubquadCallback
from .config import SubquadConfig
from .errors import (
    AlreadyPatchedError,
    ConfigError,
    EmptyBatchError,
    InactivePatchError,
    NoMatchError,
    NotPatchedError,
    OutputError,
    PatchError,
    SidecarError,
    SubquadError,
    UnsupportedModuleError,
    WeightsError,
)
from .patching import dense_forward, patch_model, sparse_forward, sparse_mlps, unpatch_model
from .sidecar import load_sidecar, save_sidecar
from .sync import SyncReport, check_active, sync_model

__version__ = "0.1.0"

__all__ = [
    "AlreadyPatchedError",
    "ConfigError",
    "EmptyBatchError",
    "InactivePatchError",
    "NoMatchError",
    "NotPatchedError",
    "OutputError",
    "PatchError",
    "SidecarError",
    "SubquadCallback",
    "SubquadConfig",
    "SubquadError",
    "SyncReport",
    "UnsupportedModuleError",
    "WeightsError",
    "check_active",
    "dense_forward",
    "load_sidecar",
    "patch_model",
    "save_sidecar",
    "sparse_forward",
    "sparse_mlps",
    "sync_model",
    "unpatch_model",
]
