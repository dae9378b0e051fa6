"""Fine-tune Hugging Face models with less work in their wide MLPs and their head; checkpoints stay plain."""

from .config import SubquadConfig
from .errors import (
    AlreadyPatchedError,
    BackendError,
    CalibrationError,
    ConfigError,
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
from .head.patch_head import patch_head, unpatch_head
from .layers.dense_or_sparse import dense_forward, sparse_forward
from .layers.patched_mlps import sparse_mlps
from .patching.patch import apply_plan, patch_model, unpatch_model
from .plan import LayerPlan, Plan
from .planning.make_plan import calibrate, compensate
from .training.budget_control import BudgetChange
from .training.callback import SubquadCallback
from .training.resume import last_whole_checkpoint
from .training.sidecar import load_sidecar, save_sidecar
from .training.sync_model import SyncReport, check_active, sync_model
from .weights.merged_export import merged_named_weights, save_merged

__version__ = "0.1.0"

__all__ = [
    "AlreadyPatchedError",
    "BackendError",
    "BudgetChange",
    "CalibrationError",
    "ConfigError",
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
    "merged_named_weights",
    "patch_head",
    "patch_model",
    "save_merged",
    "save_sidecar",
    "sparse_forward",
    "sparse_mlps",
    "sync_model",
    "unpatch_head",
    "unpatch_model",
]
