"""The settings, as one dataclass, with the same names in Python, on the command line and in YAML."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .errors import ConfigError

TileOrder = Literal["similar", "consecutive"]
BackendName = Literal["auto", "torch", "triton"]
LayerGroup = Literal["all", "all_but_first"]

# What a unit of `tolerance` allows.
COSINE_PER_TOLERANCE = 10.0  # 1 - cosine of the gradient
DIVERGENCE_PER_TOLERANCE = 10.0  # nats: what context tokens miss shows in the divergence, but little in training
NOISE_PER_TOLERANCE = 50.0  # of the squared gradient: sampled rows change it in another direction in every step

_LARGEST_SEED = 2**63 - 1  # the largest that random generators accept
_LARGEST_NUMBER = 3e38  # of float32


def _integer(value: Any, low: int, high: float = math.inf) -> bool:
    return type(value) is int and low <= value <= high


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and bool(value) and all(isinstance(v, str) and v for v in value))


def _active(value: Any) -> bool:
    return value is None or _integer(value, 1) or (isinstance(value, float) and 0 < value <= 1)


def _layers(value: Any) -> bool:
    numbers = isinstance(value, list) and bool(value) and all(_integer(i, 0) for i in value)
    return numbers or (isinstance(value, str) and value in get_args(LayerGroup))


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "rank tile_size sketch_rank": ("an integer of at least 1", lambda value: _integer(value, 1)),
    "fold_steps refresh_steps head_megabytes": ("an integer of at least 0", lambda value: _integer(value, 0)),
    "seed": (f"an integer from 0 to {_LARGEST_SEED}", lambda value: _integer(value, 0, _LARGEST_SEED)),
    "alpha tolerance": (
        "a positive number that float32 can hold",
        lambda value: _number(value) and 0 < value < _LARGEST_NUMBER,
    ),
    "dense_share": ("a share of the training steps from 0 to 1", lambda value: _number(value) and 0 <= value <= 1),
    "active": ("an integer from 1 (neurons), a float above 0 and up to 1.0 (a share), or null", _active),
    "layers_to_transform": (
        f"{' or '.join(map(repr, get_args(LayerGroup)))} or a list of layer numbers from 0", _layers,
    ),
    "tile_order": (f"one of {get_args(TileOrder)}", lambda value: value in get_args(TileOrder)),
    "backend": (f"one of {get_args(BackendName)}", lambda value: value in get_args(BackendName)),
    "sparse_eval": ("true or false", lambda value: isinstance(value, bool)),
    "index_factory": ("a faiss factory string", lambda value: isinstance(value, str) and value != ""),
    "target_modules exclude_modules": ("a list of module names or null", _names),
}  # fmt: skip


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class SubquadConfig:
    """Settings of the sparse layers, their index, their low-rank updates and the head.

    Raises:
        ConfigError: a field is out of range; the message names the field and the value it got.
    """

    rank: int = _setting(16, "Rank q of the trainable update U V of every patched matrix.")
    alpha: float = _setting(16.0, "The update is scaled by alpha / rank, as in LoRA.")
    active: int | float | None = _setting(
        None,
        "Neurons computed for each token: a number (int), a share in (0, 1] (float), or null to plan it. Until there "
        "is a plan, null means ceil(m ** 0.8) of m neurons, the sparsity of the paper.",
    )
    tolerance: float = _setting(
        0.0004,
        "What a plan may lose: the gradient keeps a cosine of at least 1 - 10 times this with the exact one, and "
        "predictions diverge by at most 10 times this from the dense model's, in nats per predicted token; sampled "
        "rows add noise of at most 50 times this, as a share of the squared gradient.",
    )
    tile_size: int = _setting(128, "About how many tokens share one selection of neurons.")
    tile_order: TileOrder = _setting(
        "similar", "How tokens form tiles: 'similar' (bisection by content) or 'consecutive'."
    )
    layers_to_transform: list[int] | LayerGroup = _setting(
        "all",
        "Layer numbers to patch, or 'all', or 'all_but_first'. The first layer of a stack is far less sparse than the "
        "rest. A plan accounts for that; with a fixed `active`, use 'all_but_first'.",
    )
    target_modules: list[str] | None = _setting(
        None,
        "Names of the projections to patch (e.g. ['fc1', 'fc2']), or null for every known MLP.",
    )
    exclude_modules: list[str] | None = _setting(
        None,
        "Modules to leave out with everything inside them, by name or end of path (e.g. ['vision_tower']), or null.",
    )
    sketch_rank: int = _setting(64, "Rank r of the activation index.")
    seed: int = _setting(
        0,
        "Seed of the index, of the factors and of planning. Where rows of the gradient are sampled, training draws "
        "from PyTorch's own generator, as dropout does.",
    )
    fold_steps: int = _setting(0, "Number of steps between folds of U V into the base weights; 0: never.")
    refresh_steps: int = _setting(
        100,
        "Number of steps between audits of a few tiles of the current batch, after which planned budgets are adjusted; "
        "0: never.",
    )
    dense_share: float = _setting(
        0.0, "Share of the training steps, spread evenly, that compute all neurons: 0.1 is every tenth."
    )
    sparse_eval: bool = _setting(False, "Evaluate with the planned budgets too; by default evaluation is dense.")
    index_factory: str = _setting("Flat", "faiss factory string for half-space reporting.")
    backend: BackendName = _setting(
        "auto",
        "What computes the sparse layers on a CUDA device: 'torch', 'triton', or 'auto' (Triton if it is installed). "
        "Other devices use PyTorch.",
    )
    head_megabytes: int = _setting(
        256,
        "In training, compute logits at labelled positions only, in chunks of at most this many MB; 0: at all "
        "positions, as in plain training. Exact.",
    )

    def __post_init__(self) -> None:
        for names, (wanted, is_right) in _RULES.items():
            for name in names.split():
                if not is_right(value := getattr(self, name)):
                    raise ConfigError(f"{name} must be {wanted}, got {value!r}")

    @property
    def scale(self) -> float:
        """Factor alpha / rank of the update U V."""
        return self.alpha / self.rank

    def active_neurons(self, neurons: int) -> int:
        """Number k of neurons computed for each token in a layer of `neurons` neurons.

        Raises:
            ConfigError: `active` asks for more neurons than the layer has.
        """
        if self.active is None:
            return min(neurons, math.ceil(round(neurons**0.8, 6)))  # 1024 ** 0.8 is 256, in floats a hair more
        if isinstance(self.active, int):
            if self.active > neurons:
                raise ConfigError(f"active={self.active} exceeds the {neurons} neurons of a layer")
            return self.active
        return max(1, math.ceil(self.active * neurons))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SubquadConfig":
        """Inverse of `to_dict`. Unknown names raise a `ConfigError`."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown settings {unknown}; known are {sorted(known)}")
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "SubquadConfig":
        """Inverse of `to_json`. Anything but a JSON object of known names raises a `ConfigError`."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"settings are not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"settings must be a JSON object, got {text!r}")
        return cls.from_dict(values)
