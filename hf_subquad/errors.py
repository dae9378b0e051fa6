"""Typed errors. Each message names the place and the fix; the model is left unchanged."""


class SubquadError(Exception):
    """Base of every error raised by this library."""


class ConfigError(SubquadError, ValueError):
    """A setting is out of range, or impossible for the layer it is applied to."""


class PatchError(SubquadError, ValueError):
    """A model cannot be patched as asked. The model is unchanged."""


class NoMatchError(PatchError):
    """No MLP matched the request; the message lists what was searched and the nearest names."""


class UnsupportedModuleError(PatchError):
    """An MLP was found that cannot be made sparse (quantised, wrapped, or not elementwise)."""


class AlreadyPatchedError(PatchError):
    """The model is patched already."""


class NotPatchedError(SubquadError, ValueError):
    """The call needs a patched model."""


class WeightsError(SubquadError, ValueError):
    """Weights hold NaN or infinite values."""


class InactivePatchError(SubquadError, RuntimeError):
    """The patch is present but would not take effect (frozen factors, replaced forward, ...)."""


class ParallelismError(SubquadError, RuntimeError):
    """Training would split or copy the patched layers, which the patch does not support."""


class BackendError(SubquadError, RuntimeError):
    """The requested compute backend cannot run here."""


class CalibrationError(SubquadError, ValueError):
    """A model cannot be calibrated on these batches."""


class PlanError(SubquadError, ValueError):
    """A plan is damaged, or was made for another model or other settings."""


class SidecarError(SubquadError, RuntimeError):
    """A `subquad_state.safetensors` file is damaged, or belongs to another model."""


class OutputError(SubquadError, OSError):
    """An output file could not be written. Nothing was left half-written."""


class DataError(SubquadError, ValueError):
    """Samples or targets of a wide net have wrong shapes, or hold NaN or infinite values."""


class NotFittedError(SubquadError, ValueError, AttributeError):
    """The regressor was not fitted yet."""


class DivergedError(SubquadError, ArithmeticError):
    """Values in training are no longer finite, or its linear system cannot be solved."""


class StaleStateError(SubquadError, RuntimeError):
    """Something else changed a matrix, so what is maintained about it is out of date."""
