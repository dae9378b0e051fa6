"""The selections that are compared: the library's tiles, and two coarser ones that only this study has.

`fixed` and `sequence` stand in for the index's own `select`; all else (compute, compensation, plans) is the library's.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_subquad.config import TileOrder
from hf_subquad.index.activation_index import ActivationIndex
from hf_subquad.index.selection_quality import exact_importance
from hf_subquad.layers.compensation import Compensation
from hf_subquad.layers.lookup import runtime_of, sparse_mlps
from hf_subquad.layers.preserve_mode_and_rng import preserve_mode_and_rng
from hf_subquad.layers.sparse_mlp import SparseMLP
from hf_subquad.ops.token_tiles import Selection, TokenTiles
from hf_subquad.planning.measurements import seeing_tokens
from hf_subquad.planning.predictions import Batch

_SCORED_ONE_IN = 4  # tokens of a sequence: with fewer it chooses worse, and tiles of 64 have as many scored

_NAME = re.compile(r"(?:(dense)|(fixed|sequence)|(consecutive|similar)-([1-9]\d*))(\+compensation(\+plan)?)?")


@dataclass(frozen=True)
class Method:
    """A way to choose neurons.

    Attributes:
        name: as on the command line, such as "similar-64+compensation+plan".
        sharing: which tokens share a selection: all of training ("fixed"), a sequence, or a tile.
        tile_size: tokens of a tile, if tiles share.
        compensated: a linear map stands in for what skipped neurons would add.
        planned: neurons are spread over the MLPs by predicted loss; else every MLP gets the same share of its own.
    """

    name: str
    sharing: str
    tile_size: int | None
    compensated: bool
    planned: bool

    @classmethod
    def parse(cls, text: str) -> "Method":
        """
        Raises:
            ValueError: no such method.
        """
        found = _NAME.fullmatch(text)
        if not found or (found[1] and found[5]):
            raise ValueError(
                f"unknown method {text!r}: expected dense, or fixed, sequence, consecutive-T or similar-T (tiles of T "
                "tokens), with +compensation or +compensation+plan if wanted"
            )
        sharing = found[1] or found[2] or found[3]
        return cls(text, sharing, int(found[4]) if found[4] else None, bool(found[5]), bool(found[6]))


@dataclass(frozen=True)
class Budgets:
    """Neurons of each MLP, in the model's order, and what stands in for the others; all m neurons: dense."""

    active: Sequence[int]
    compensations: Sequence[Compensation | None]

    def apply(self, model: nn.Module) -> None:
        for mlp, k, compensation in zip(sparse_mlps(model), self.active, self.compensations, strict=True):
            mlp.set_active(k)
            mlp.compensation = None if mlp.dense else compensation


class FixedSet:
    """The same neurons for all tokens, whatever they are, for no more than the copies that tiles take too.

    Args:
        importance: float [m].
    """

    def __init__(self, importance: Tensor) -> None:
        self._importance = importance
        self._chosen: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, k: int, tile_size: int, order: TileOrder) -> Selection:
        if k not in self._chosen:
            self._chosen[k] = self._importance.topk(k).indices.unsqueeze(0)
        return Selection(equal_runs(len(x), 1, x.device), self._chosen[k])


class WholeSequences:
    """One set for each sequence, chosen as the index does for tiles: SparseLoRA's granularity.

    Long consecutive tiles would be sequences only where their number is a power of two, and the index would score
    too few of their tokens to do this granularity justice.
    """

    def __init__(self, index: ActivationIndex, sequences: int) -> None:
        self._index, self._sequences = index, sequences

    @torch.no_grad()
    def __call__(self, x: Tensor, k: int, tile_size: int, order: TileOrder) -> Selection:
        tiles = equal_runs(len(x), self._sequences, x.device)
        scores = self._index.tile_scores(x[tiles.slots[:, ::_SCORED_ONE_IN]])
        return Selection(tiles, self._index.backend(x.device).top_neurons(scores, k))


def equal_runs(tokens: int, count: int, device: torch.device) -> TokenTiles:
    """`count` tiles of consecutive tokens, which must divide evenly."""
    entries = torch.arange(tokens, device=device).view(count, -1)
    return TokenTiles.of(entries, tokens)


def install(model: nn.Module, method: Method, importance: Mapping[str, Tensor], sequences: int) -> None:
    """Let the MLPs of a patched model select as `method` says.

    Args:
        importance: float [m] of every MLP by its name in the bare model, see `token_importance`.
        sequences: of every batch.
    """
    runtime = runtime_of(model)
    if method.tile_size is not None:
        runtime.config = dataclasses.replace(runtime.config, tile_size=method.tile_size, tile_order=method.sharing)
    for mlp in sparse_mlps(model):
        vars(mlp.index).pop("select", None)
        if method.sharing == "fixed":
            mlp.index.select = FixedSet(importance[mlp.name])
        elif method.sharing == "sequence":
            mlp.index.select = WholeSequences(mlp.index, sequences)


def token_importance(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The index's importance of every neuron, summed over the tokens of all batches: float32 [m] by MLP.

    From the true pre-activations, not their sketch: a set that is chosen once may cost anything.
    """
    sums: dict[str, Tensor] = {}

    def see(mlp: SparseMLP, tokens: Tensor) -> None:
        scores = exact_importance(mlp.index, tokens).sum(0) * mlp.index.output_norms
        sums[mlp.name] = sums.get(mlp.name, 0) + scores

    with preserve_mode_and_rng(model), seeing_tokens(model, sparse_mlps(model), see):
        for batch in batches:
            model(**batch)
    return sums
