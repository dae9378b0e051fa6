"""Which MLPs are measured."""

from dataclasses import dataclass

TILE = 128
RANK = 16


@dataclass(frozen=True)
class Shape:
    """An MLP from `hidden` features to `intermediate` neurons and back.

    Attributes:
        gated: SiLU gate times up, no biases (Llama); otherwise ReLU with biases (OPT).
    """

    name: str
    hidden: int
    intermediate: int
    gated: bool

    @property
    def paper_active(self) -> int:
        """m ** 0.8 neurons, the sparsity of the paper (a share of m ** -0.2), as `SubquadConfig` rounds it."""
        from hf_subquad import SubquadConfig

        return SubquadConfig().active_neurons(self.intermediate)


LLAMA_1B = Shape("Llama-3.2-1B", 2048, 8192, gated=True)
LLAMA_8B = Shape("Llama-3-8B", 4096, 14336, gated=True)
OPT_7B = Shape("OPT-6.7B", 4096, 16384, gated=False)
TINY_GATED = Shape("tiny gated", 32, 96, gated=True)
TINY_RELU = Shape("tiny ReLU", 32, 128, gated=False)


@dataclass(frozen=True)
class Sizes:
    """What all sections run on.

    Attributes:
        main: the MLP whose targets count.
        others: further MLPs.
        tokens: at which layers are timed; the first counts.
        shares: of the neurons, beside the paper's.
        tiles: further tile sizes at the main point.
    """

    main: Shape
    others: tuple[Shape, ...]
    tokens: tuple[int, ...]
    shares: tuple[float, ...]
    tile: int
    tiles: tuple[int, ...]
    rank: int


FULL = Sizes(LLAMA_8B, (LLAMA_1B, OPT_7B), (8192, 4096, 16384, 2048), (0.25, 0.165, 0.125, 0.06), TILE, (64, 256), RANK)
TINY = Sizes(TINY_GATED, (TINY_RELU,), (40,), (0.25,), 16, (32,), 4)
