"""Weights that bitsandbytes holds in 4 bits (nf4, fp4), as in QLoRA (Dettmers et al. 2023): how their rows are read.

Blocks of consecutive values of the flattened weight [out, in] share a scale. A row of it, which is a neuron of an input
projection, is made of whole blocks if their size divides `in`, so chosen rows are dequantised alone. A neuron of an
output projection is a column, which cuts across all blocks: that weight is dequantised whole. Either way the values
exist for one pass through the MLP; what is kept for the backward pass is the storage.

bitsandbytes is looked up among the imported modules, and never imported: a model that holds its layers has imported it.
"""

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.backends import StoredRows


def is_4bit(module: nn.Module) -> bool:
    """Whether a module is a `Linear4bit` of bitsandbytes."""
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(module, library.nn.Linear4bit)


def quant_state(module: nn.Module) -> Any:
    """The `QuantState` of a `Linear4bit`: shape [out, in] and dtype of the weight, and scales of its blocks. None if it
    is not quantised yet, and for other modules."""
    if not is_4bit(module):
        return None
    weight: Any = module._parameters["weight"]
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        module.state_dict()  # which undoes, in place, that evaluation on some CPUs packs the weight in another way
        state = weight.quant_state
    return state


@torch.no_grad()
def dequantized(weight: Tensor, state: Any, rows: Tensor | slice | None = None) -> Tensor:
    """The weight [out, in], or some of its rows, by bitsandbytes' own kernels, in the dtype that was quantised.

    Args:
        weight: packed, of any dtype.
        rows: a slice or int64 [k]; only where the block size divides `in`. The same values to the bit as all rows have.
    """
    functional = sys.modules["bitsandbytes"].functional
    packed = weight.detach().view(torch.uint8)
    if rows is None:
        return functional.dequantize_4bit(packed.reshape(-1, 1), state)
    absmax = state.absmax
    if state.nested:  # double quantisation
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    chosen = absmax.float().view(state.shape[0], -1)[rows]
    part = functional.QuantState(
        absmax=chosen.flatten(),
        shape=torch.Size((len(chosen), state.shape[1])),
        dtype=state.dtype,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
    )
    return functional.dequantize_4bit(packed.view(state.shape[0], -1)[rows].reshape(-1, 1), part)


def dequantized_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain `nn.Linear` in place of a `Linear4bit`."""
    found = {"weight": dequantized(module.get_parameter("weight"), quant_state(module))}
    bias = module._parameters["bias"]
    return found if bias is None else found | {"bias": bias.detach()}


@dataclass(frozen=True, eq=False)
class QuantizedRows(StoredRows):
    """Base rows [m, d] in 4 bits.

    Args:
        weight: packed.
        is_rows: neurons are rows of the weight; otherwise its columns.
        dtype: of the loaded rows.
        contiguous: load contiguous rows, as gathering needs.
        neurons: which of the weight's neurons; None: all.
    """

    weight: Tensor
    state: Any
    is_rows: bool
    dtype: torch.dtype
    contiguous: bool = False
    neurons: range | None = None

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        neurons, width = self.state.shape if self.is_rows else self.state.shape[::-1]
        return neurons if self.neurons is None else len(self.neurons), width

    def load(self, neurons: Tensor | None = None) -> Tensor:
        first = self.neurons.start if self.neurons else 0
        mine = slice(first, first + len(self))
        if not self.is_rows or self.state.shape[1] % self.state.blocksize:
            whole = dequantized(self.weight, self.state)
            rows = (whole if self.is_rows else whole.t())[mine].to(self.dtype)
            return rows.contiguous() if self.contiguous else rows
        if neurons is None or neurons.device.type != "cpu":  # elsewhere, counting them would wait for the device
            return dequantized(self.weight, self.state, mine).to(self.dtype)
        found = torch.zeros(self.shape, dtype=self.dtype, device="cpu")
        used = torch.zeros(len(self), dtype=torch.bool, device="cpu").index_fill_(0, neurons.flatten(), True)
        chosen = used.nonzero().squeeze(1)
        if len(chosen):
            found.index_copy_(0, chosen, dequantized(self.weight, self.state, chosen + first).to(self.dtype))
        return found

    def __getitem__(self, neurons: slice) -> "QuantizedRows":
        return replace(self, neurons=(self.neurons or range(len(self)))[neurons])


class LinearIn4Bits(torch.autograd.Function):
    """x W^T [..., out] in the dtype of x: W is dequantised again in the backward pass instead of being kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: Any) -> Tensor:
        ctx.weight, ctx.state = weight, state
        return F.linear(x, dequantized(weight, state).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ dequantized(ctx.weight, ctx.state).to(grad.dtype), None, None
