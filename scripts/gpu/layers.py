"""Section `layers`: the benchmark of one MLP with one budget for all tokens, and with budgets for classes of tokens."""

from collections.abc import Iterator
from functools import partial

from benchmarks import layer

from hf_subquad import SubquadConfig
from hf_subquad.layers.budget import Budget

from .bench import Bench, Case, Row

_SHARES = (None, 0.25, 0.125, 0.06)  # of the neurons; None: m ** 0.8 of them


def cases(bench: Bench) -> list[Case]:
    return [
        (f"{mlp}, {tokens} tokens, {'classes' if classes else 'tiles'}", partial(_layer, bench, mlp, classes, tokens))
        for tokens in ([bench.tokens] if bench.tiny else [bench.tokens, 2048])
        for mlp in bench.mlps
        for classes in (False, True)
    ]


def _layer(bench: Bench, mlp: str, classes: bool, tokens: int) -> Iterator[Row]:
    neurons = bench.mlps[mlp][1]
    counts = {share: SubquadConfig(active=share).active_neurons(neurons) for share in _SHARES}
    tiled = {f"{share or 'm^0.8'} of the neurons": Budget(k, k) for share, k in counts.items()}
    for row in layer.bench(bench.layer(mlp, classes, tokens), tiled):
        yield {"mlp": mlp, **row}
