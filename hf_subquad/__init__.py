"""Subquadratic fine-tuning of wide MLP layers for Hugging Face models."""

from .calibration import calibrate, compensate
from .callback import SubquadCallback
from .checkpoints import last_whole_checkpoint
from .config import SubquadConfig
from .errors import (
    AlreadyPatchedError,
    BackendError,
    CalibrationError,
    ConfigError,
    EmptyBatchError,
    InactivePatchError,
    NoMatchError,
    NotPatchedError,
    OutputError,
    ParallelismError,
    PatchError,
    PlanError,
    SidecarError,
    SubquadError,
    UnsupportedModuleError,
    WeightsError,
)
from .patching import apply_plan, dense_forward, patch_model, sparse_forward, sparse_mlps, unpatch_model
from .plan import LayerPlan, Plan
from .sidecar import load_sidecar, save_sidecar
from .sync import SyncReport, check_active, sync_model
from .watch import BudgetChange

__version__ = "0.1.0"

__all__ = [
    "AlreadyPatchedError",
    "BackendError",
    "BudgetChange",
    "CalibrationError",
    "ConfigError",
    "EmptyBatchError",
    "InactivePatchError",
    "LayerPlan",
    "NoMatchError",
    "NotPatchedError",
    "OutputError",
    "ParallelismError",
    "PatchError",
    "Plan",
    "PlanError",
    "SidecarError",
    "SubquadCallback",
    "SubquadConfig",
    "SubquadError",
    "SyncReport",
    "UnsupportedModuleError",
    "WeightsError",
    "apply_plan",
    "calibrate",
    "check_active",
    "compensate",
    "dense_forward",
    "last_whole_checkpoint",
    "load_sidecar",
    "patch_model",
    "save_sidecar",
    "sparse_forward",
    "sparse_mlps",
    "sync_model",
    "unpatch_model",
]
