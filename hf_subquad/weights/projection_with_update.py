"""One weight matrix of an MLP, as one row per neuron, with its low-rank update."""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import ParallelismError, PatchError
from ..ops.backends import MergedWeight
from .low_rank import LowRankUpdate
from .quantized import LinearIn4Bits, QuantizedRows, dequantized, quant_state
from .returned_state_dicts import HandedOut
from .shards import gathered, is_shard, split_like

_SAMPLED = 256


def compute_dtype(values: Tensor) -> torch.dtype:
    """The dtype that a dense projection of `values` would compute in now: theirs, or autocast's."""
    device = values.device.type
    if torch.is_autocast_enabled(device) and values.dtype is not torch.float64:  # which autocast leaves alone
        return torch.get_autocast_dtype(device)
    return values.dtype


class NeuronProjection(nn.Module):
    """A linear projection whose weight keeps its name, shape, values and layout.

    `rows()` is [m, d] with row i for neuron i, on both sides of an MLP: in the layout of `nn.Linear`, the weight of an
    input projection, and the transposed weight of an output projection. The current rows are rows + scale U V.

    A weight in 4 bits stays in them: each pass dequantises what it needs, and nothing is folded into it.

    Subclasses set `is_input`, and the `layers.sparse_mlp.SparseMLP` that it belongs to sets `mlp`.

    Args:
        source: the projection replaced, an `nn.Linear`, `Conv1D` or `Linear4bit`; weight and bias are shared with it.
        runtime: the MLP's `layers.shared_state.Runtime`: the config, and whether updates are switched off.
        seed: of the update's random factor.

    Attributes:
        shape: m and d.
        in_features, out_features: as of `nn.Linear`.
        trainable: which parameters of the source were trainable, by name.
        kept_frozen: the user had frozen the weight before the patch, so the update is frozen, too.
        moments_are_stale: a fold or other weights restarted the update, and the optimizer's moments of it are not reset
            yet.
    """

    is_input: bool
    mlp: Any

    def __init__(self, source: nn.Module, runtime: Any, seed: int) -> None:
        super().__init__()
        self.runtime = runtime
        self.weight = source.get_parameter("weight")
        self.bias = source._parameters["bias"]
        self._quant_state = quant_state(source)
        # Linear stores [out, in], Conv1D [in, out]; neurons are the outputs of an input projection.
        self.weight_is_rows = self.is_input != isinstance(source, Conv1D)
        self.source_class = type(source).__name__
        self.trainable = {name: parameter.requires_grad for name, parameter in source.named_parameters()}
        shape = self.weight.shape if self._quant_state is None else self._quant_state.shape
        neurons, width = shape if self.weight_is_rows else shape[::-1]
        self.shape = neurons, width
        self.in_features, self.out_features = (width, neurons) if self.is_input else (neurons, width)
        config = runtime.config
        zero: Literal["U", "V"] = "U" if self.is_input else "V"
        self.update = LowRankUpdate(neurons, width, config.rank, config.scale, zero, seed, like=self.weight)
        self.kept_frozen = False
        self.moments_are_stale = False
        self._handed_out = HandedOut()
        self._copied_rows: tuple[tuple[Any, ...], Tensor] | None = None

    @property
    def quantization(self) -> Any:
        """bitsandbytes' `QuantState` of a weight in 4 bits, or None."""
        # Of the parameter, since copies and moves between devices keep that one right; it loses it where PyTorch makes
        # a plain parameter of it.
        return self._quant_state and (getattr(self.weight, "quant_state", None) or self._quant_state)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight; of the dequantised one, if it is in 4 bits."""
        return self.weight.dtype if self._quant_state is None else self._quant_state.dtype

    def rows(self, dtype: torch.dtype | None = None, contiguous: bool = False) -> Tensor:
        """Base rows [m, d], detached.

        Args:
            dtype: None: the weight's.
            contiguous: with contiguous rows, as gathering needs.

        In another dtype or layout this is a copy, which is kept until the weight changes or `drop_copy` is called. Of
        weights that FSDP2 shards no copy is kept, and none is made for the layout: the backward pass would hold it.
        Rows of a weight in 4 bits are dequantised in each call, and not kept.
        """
        if self._quant_state is not None:
            return self._quantized_rows(dtype or self.dtype, contiguous).load()
        self._handed_out.notice_writes()
        weight = self.weight.detach()
        rows = weight if self.weight_is_rows else weight.t()
        dtype = dtype or rows.dtype
        if dtype == rows.dtype and (rows.is_contiguous() or not contiguous):
            return rows
        if self.runtime.sharded:
            return rows.to(dtype)
        version = (dtype, self.weight.data_ptr(), self.weight._version, self.weight.device)
        if self._copied_rows is None or self._copied_rows[0] != version:
            with torch.inference_mode(False):  # inference tensors could not be used in training later
                self._copied_rows = (version, rows.to(dtype).contiguous())
        return self._copied_rows[1]

    def drop_copy(self) -> None:
        """Free the copy that `rows` keeps."""
        self._copied_rows = None

    def matrix(self, dtype: torch.dtype, contiguous: bool = False) -> MergedWeight:
        """Base rows as of `rows`, those in 4 bits yet to be loaded, and the update's factors with gradients."""
        quantized = self._quant_state is not None
        rows = self._quantized_rows(dtype, contiguous) if quantized else self.rows(dtype, contiguous)
        return MergedWeight(cast(Tensor, rows), *self.update.factors(), self.bias)

    def merged_rows(self) -> Tensor:
        """rows + scale U V, [m, d] in the dtype of the weight."""
        return self.update.added_to(self.rows())

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """Squared norms of the current rows, float32 [m]."""
        rows = self.merged_rows()
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return torch.linalg.vector_norm(rows, dim=1, dtype=dtype).float().square()

    def merged_weight(self) -> Tensor:
        """The weight in a plain checkpoint: the current rows in the weight's own shape, contiguous."""
        live = self.merged_rows()
        return (live if self.weight_is_rows else live.t()).contiguous()

    def plain_state(self) -> dict[str, Tensor]:
        """The state dict of the plain projection with the update merged in."""
        found = {"weight": self.merged_weight()}
        return found if self.bias is None else found | {"bias": self.bias.detach()}

    def sample(self, live: bool = False) -> Tensor:
        """Values spread over the base or the merged weight, used to recognise it: float32 [256 or fewer]."""
        whole = self.weight.detach() if self._quant_state is None else dequantized(self.weight, self.quantization)
        values = (self.merged_weight() if live else whole).flatten()
        return values[:: max(1, len(values) // _SAMPLED)][:_SAMPLED].float()

    @torch.no_grad()
    def set_rows(self, rows: Tensor) -> None:
        """Overwrite the base rows in place, so that tied weights follow.

        Raises:
            PatchError: they are in 4 bits.
        """
        if self._quant_state is not None:
            raise PatchError(
                "a base weight in 4 bits is never written to, as rounding it again would lose most of an update: set "
                "fold_steps=0, and for the plain dequantised model, call save_merged or merged_named_weights"
            )
        self.weight.copy_(rows if self.weight_is_rows else rows.t())

    def dense(self, x: Tensor) -> Tensor:
        """The projection with all neurons: x (R + s U V)^T + b into neurons, x (R + s U V) + b out of them.

        Base weights get no gradients, whatever their `requires_grad`, as in sparse passes.
        """
        bias = None if self.bias is None else self.bias.detach()
        if self._quant_state is None:
            weight = self.rows() if self.is_input else self.rows().t()
            y = F.linear(x, weight, bias)
        else:
            y = LinearIn4Bits.apply(x.to(compute_dtype(x)), self.weight.detach(), self.quantization)
            y = y if bias is None else y + bias.to(y.dtype)
        if self.runtime.updates_off():
            return y
        u, v = self.update.U.to(x.dtype), self.update.V.to(x.dtype)
        low = F.linear(F.linear(x, v), u) if self.is_input else x @ u @ v
        return torch.add(y, low, alpha=self.update.scale)

    def _quantized_rows(self, dtype: torch.dtype, contiguous: bool = False) -> QuantizedRows:
        return QuantizedRows(self.weight.detach(), self.quantization, self.weight_is_rows, dtype, contiguous)

    def extra_repr(self) -> str:
        neurons, width = self.shape
        return (
            f"{self.source_class} of {neurons} neurons x {width}, made sparse by hf_subquad: leave it out of PEFT's "
            "target_modules, or set them to 'all-linear'"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._quant_state is not None:
            if "peft_config" in vars(self.runtime.surroundings.model):  # of this, a checkpoint has only PEFT's adapters
                return
            raise PatchError(
                f"{prefix}weight is in 4 bits, and a checkpoint with its update would be dequantised in part, which "
                "from_pretrained cannot load: call save_merged for a plain dequantised checkpoint, or save_sidecar for "
                "the updates alone"
            )
        with gathered([self]), torch.inference_mode(False), torch.no_grad():  # writes to the copy are counted
            merged = self.merged_weight()
        split = is_shard(self.weight)
        destination[prefix + "weight"] = split_like(merged, self.weight) if split else merged
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        if not merged.is_meta and not split:
            content = self._handed_out.remember(merged, self.update.U, self.update.V)
            if merged.data_ptr() != self.weight.data_ptr():  # else what is written into it is written into the weight
                self._handed_out.watch(merged, content, self._written)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        errors: list[str] = args[-1]
        if self._quant_state is not None and prefix + "weight" in state_dict:
            errors.append(
                f"{prefix}weight is in 4 bits and cannot be loaded into: load the weights before patch_model, and the "
                "updates with load_sidecar"
            )
            return
        before = len(errors)
        self._handed_out.notice_writes()  # of the state that may be loaded now
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "weight" in state_dict and len(errors) == before:
            self._whole_weight_came()

    @torch.no_grad()
    def _written(self, merged: Tensor) -> None:
        self.weight.copy_(merged)
        self._whole_weight_came()

    @torch.no_grad()
    def _whole_weight_came(self) -> None:
        """The base weight was overwritten with a merged one, on which an update would count twice.

        If it came from this projection's `state_dict`, the update of that time is restored; else it restarts.
        """
        known = None if self.weight.is_meta or is_shard(self.weight) else self._handed_out.recall(self.weight)
        if known is None:
            with gathered([self.update]):
                self.update.restart()
        else:
            for factor, value in zip(self.update.parameters(), known, strict=True):
                factor.copy_(value)
            rows = self.update.added_to(self.rows(), sign=-1)
            weight = rows if self.weight_is_rows else rows.t()
            self.weight.data = weight.clone(memory_format=torch.contiguous_format)  # not what was assigned
        self.moments_are_stale = known is None
        if not self.is_input:  # an MLP's output projection is loaded after its input projections
            self.mlp.index.rebuild_if_stale()

    def _replicate_for_data_parallel(self) -> "NeuronProjection":
        raise ParallelismError(
            "torch.nn.DataParallel copies a model in every step, and the copies would share one selection of neurons: "
            "start one process per GPU (accelerate launch, torchrun), or show one GPU only (CUDA_VISIBLE_DEVICES=0)"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copied_rows": None}
