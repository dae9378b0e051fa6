"""What one method of a comparison is run with: plain data that goes to its processes and into the report."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal


@dataclass(frozen=True)
class Shape:
    """A causal language model with random weights, to be timed on random tokens.

    Attributes:
        padding, context: mean shares of the batch that are padding, and tokens without loss that are not.
        kv_heads: heads of keys and values (Llama); 0: as many as of queries.

    Raises:
        ValueError: an unknown architecture, a size below 1, or impossible shares.
    """

    hidden: int
    intermediate: int
    layers: int
    vocab: int
    arch: Literal["opt", "llama"] = "opt"
    padding: float = 0.0
    context: float = 0.0
    kv_heads: int = 0

    def __post_init__(self) -> None:
        if self.arch not in ("opt", "llama"):
            raise ValueError(f"arch must be 'opt' or 'llama', got {self.arch!r}")
        for name in ("hidden", "intermediate", "layers", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (0 <= self.padding <= 0.5 and 0 <= self.context < 1 - self.padding):
            raise ValueError(f"no rows have shares padding={self.padding} (at most 0.5) and context={self.context}")

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From "hidden=2048,intermediate=8192,layers=4,vocab=8192,arch=opt".

        Raises:
            ValueError: a part that is unknown, missing or not a number.
        """
        values: dict[str, Any] = {}
        known = [f.name for f in fields(cls)]
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name not in known:
                raise ValueError(f"unknown part {part!r}; known are {', '.join(known)}")
            values[name] = {"arch": str, "padding": float, "context": float}.get(name, int)(value)
        missing = [name for name in known[:4] if name not in values]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}")
        return cls(**values)


@dataclass(frozen=True)
class RunSettings:
    """Settings of one method. All methods of a comparison share all but `method`, `learning_rate` and `save_to`.

    Exactly one of `model` (a folder or a Hub name, with `train_file` and `eval_file`) and `shape` is set.
    """

    method: Literal["vanilla", "lora", "subquad"]
    learning_rate: float
    model: str | None = None
    shape: Shape | None = None

    train_file: str | None = None  # .txt or .jsonl, see recipes/data.py
    eval_file: str | None = None
    data: dict[str, Any] = field(default_factory=dict)  # further fields of recipes' LmSettings: templates and so on
    max_eval_rows: int | None = None

    dtype: Literal["fp32", "bf16"] = "fp32"  # weights are loaded in it, and computed in it unless `autocast`
    quantize: Literal["nf4"] | None = None  # the frozen linear layers, as QLoRA does; not for vanilla
    autocast: bool = False  # the Trainer's mixed precision, bf16
    gradient_checkpointing: bool = False
    liger: bool = False  # the Trainer's use_liger_kernel
    steps: int = 60
    batch_size: int = 8
    seq_length: int = 256
    scheduler: str = "linear"
    lr_warmup_steps: int = 0
    eval_every: int = 20  # steps between dense evaluations; 0: at both ends only
    seed: int = 0
    threads: int = 2
    device: Literal["cpu", "cuda"] = "cpu"

    rank: int = 16
    alpha: float = 16.0
    rest: Literal["lora", "frozen", "full"] = "lora"
    subquad: dict[str, Any] = field(default_factory=dict)  # fields of SubquadConfig; rank, alpha, seed from above
    plan: str | None = None  # JSON file; with it nothing is planned

    rounds: int = 3  # of timing: in each, every method has a turn
    turn_steps: int = 4  # timed steps of a turn
    untimed_steps: int = 2  # steps before them, to warm up
    profile_steps: int = 2  # steps after them, in which MLPs are timed
    save_to: str | None = None  # plain checkpoint
