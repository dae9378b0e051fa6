"""Tracks merged weights that `state_dict()` returned, so that writing to them or loading them again loses nothing."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Fingerprint = tuple[int, int]

_REMEMBERED = 3  # states
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class HandedOut:
    """Merged weights of one projection that `state_dict()` returned.

    In an `nn.Module`, writing into a value of `state_dict()` writes into the model. A merged weight is a copy, so
    writes to it are detected when the weight is next used, and when the copy is freed, as in
    `for e, v in zip(ema.state_dict().values(), ...): e.copy_(v)`. This keeps nothing in memory.

    A returned state may be loaded again, after another one was tried: the factors of the latest three states are
    remembered.
    """

    def __init__(self) -> None:
        self._live: list[_Copy] = []
        self._factors: dict[Fingerprint, tuple[Tensor, Tensor]] = {}  # of the merged weights, the latest last

    def remember(self, merged: Tensor, U: Tensor, V: Tensor) -> Fingerprint:
        """Remember the factors that a merged weight was computed from. Returns how it is recognised."""
        found = fingerprint(merged)
        self._factors.pop(found, None)
        self._factors[found] = U.detach().clone(), V.detach().clone()
        if len(self._factors) > _REMEMBERED:
            del self._factors[next(iter(self._factors))]
        return found

    def recall(self, merged: Tensor) -> tuple[Tensor, Tensor] | None:
        """The factors of this merged weight, if `state_dict()` returned it."""
        return self._factors.get(fingerprint(merged)) if self._factors else None

    def watch(self, merged: Tensor, content: Fingerprint, written: Callable[[Tensor], None]) -> None:
        """Call a method of the projection with a returned copy, if it is written to."""
        self._live.append(_Copy(merged, content, self._live, written))

    def notice_writes(self) -> None:
        """Write changes of copies that are in use into the model."""
        for copy in self._live:
            copy.pass_on()

    def __getstate__(self) -> dict[str, Any]:
        return {"_live": [], "_factors": {}}


class _Copy(weakref.ref):  # type: ignore[type-arg]
    """A merged weight in use elsewhere. It shares its storage as long as that is in use, and no longer."""

    def __new__(cls, merged: Tensor, *about: Any) -> "_Copy":
        return super().__new__(cls, merged, _Copy._out_of_use)

    def __init__(
        self, merged: Tensor, content: Fingerprint, live: list["_Copy"], written: Callable[[Tensor], None]
    ) -> None:
        super().__init__(merged, _Copy._out_of_use)  # type: ignore[call-arg]
        self._shared: Tensor = merged.detach()
        self._version = self._shared._version
        self._content = content
        self._live = live
        self._written = weakref.WeakMethod(written)

    def pass_on(self, thoroughly: bool = False) -> None:
        """Write changes into the model; `thoroughly`: also those that bypass PyTorch's version counter (`.data`)."""
        changed = self._shared._version != self._version
        if changed or (thoroughly and fingerprint(self._shared) != self._content):
            self._version, self._content = self._shared._version, fingerprint(self._shared)
            if (written := self._written()) is not None:
                written(self._shared)

    @staticmethod
    def _out_of_use(copy: "_Copy") -> None:
        copy._live.remove(copy)
        copy.pass_on(thoroughly=True)


@torch.no_grad()
def fingerprint(values: Tensor) -> Fingerprint:
    """A hash of the bits of a matrix and their positions: equal for equal matrices, whatever their memory layout."""
    values = values.contiguous()
    whole = values.shape[1] * values.dtype.itemsize % 8 == 0  # a row in words of 64 bits, which add up fastest
    words = values.view(torch.int64 if whole else _INTEGERS[values.dtype.itemsize])
    by_row = words.sum(1, dtype=torch.int64)
    weights = torch.arange(1, 2 * len(by_row), 2, device=by_row.device)
    return int(by_row.sum()), int((by_row * weights).sum())
