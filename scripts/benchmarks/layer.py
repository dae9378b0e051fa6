"""Time one MLP layer, forward and backward: dense fully trained, dense frozen with LoRA, and subquad.

    python scripts/benchmarks/layer.py --tokens 2048 --hidden 2048 --intermediate 8192 --dtype fp32 --json row.json
    python scripts/benchmarks/layer.py --classes --gated

All run interleaved, one after the other in every round, and the medians over the rounds are reported; ratios are
medians of the ratios within a round. Weights and tokens are random, which costs the same as pretrained ones. Several
values, separated by commas, make a grid. With --classes, tokens are padding, context and predicted in the shares of
GSM8K, dense layers compute them all, and subquad runs with several budgets.
"""

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comparison.memory import PeakMemory, give_back_freed, resident_bytes
from comparison.random_rows import GSM8K, random_rows
from environment import provenance
from reporting import write_json

from hf_subquad import SubquadConfig, patch_model, sparse_mlps
from hf_subquad.layers.batch_hook import unwatch_batches
from hf_subquad.layers.budget import Budget
from hf_subquad.layers.compensation import Compensation
from hf_subquad.planning.mlp_timing import timed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PlainMLP(nn.Module):
    """y = W2 relu(W1 x + b1) + b2."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, intermediate)
        self.fc2 = nn.Linear(intermediate, hidden)
        self.activation_fn = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update, as PEFT computes it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Subjects:
    """An MLP in several ways: "dense_full", "dense_lora", and patched, with each of some budgets.

    Attributes:
        x, gradient: its input [N, d], and the gradient of its output.
        budgets: by name: for classes of tokens, or those that are given, or uniform.
        ways: names of all.
    """

    def __init__(self, args: argparse.Namespace, budgets: Mapping[str, Budget] | None = None) -> None:
        self.layers = {kind: build(kind, args) for kind in ("dense_full", "dense_lora", "subquad")}
        (self.mlp,) = sparse_mlps(self.layers["subquad"])
        x = torch.randn(args.tokens, args.hidden, device=args.device, dtype=DTYPES[args.dtype])
        # Tokens of a real batch resemble each other in groups; random ones do not, and tiles of them cost the same.
        self.x = F.layer_norm(x, (args.hidden,)).requires_grad_(True)
        self.gradient = torch.randn_like(x)
        self.budgets = dict(budgets or {"uniform": Budget(self.mlp.k, self.mlp.k)})
        if args.classes:
            self._classify()
            self.budgets = {
                "padding skipped": Budget(),
                "half of the neurons for context": Budget(context=args.intermediate // 2),
                "none for context": Budget(context=0),
                "none for context, 95% of the gradient": Budget(context=0, gradient=0.95),
            }
        unwatch_batches(self.layers["subquad"])  # classes are set once; a model reads them once for all of its MLPs
        self.ways = ["dense_full", "dense_lora", *self.budgets]

    def _classify(self) -> None:
        (tokens, width), runtime, basis = self.x.shape, self.mlp.runtime, self.mlp.index.sketch.basis
        length = math.gcd(512, tokens)
        rows = random_rows(tokens // length, length, 8, *GSM8K, seed=0)
        ids, real, labels = (torch.stack([row[name] for row in rows]).to(self.x.device) for name in rows[0])
        runtime.padding.may_skip = True
        runtime.begin(self.layers["subquad"], {"input_ids": ids, "attention_mask": real, "shift_labels": labels})
        # As in training, where a sample at 95% keeps about 65% of the rows that are not padding.
        self.gradient *= torch.randn_like(self.gradient[:, :1]).exp() * real.view(-1, 1)
        zeros = basis.new_zeros(width, 1)
        self.mlp.corrections = {"context": Compensation(basis, zeros.repeat(1, len(basis)), zeros[:, 0])}

    @contextmanager
    def way(self, name: str) -> Iterator[nn.Module]:
        """The layer, which runs in this way inside of the context."""
        with self.mlp.using(self.budgets.get(name), self.mlp.corrections):
            yield self.layers.get(name, self.layers["subquad"])

    def select(self) -> None:
        """Make the selections of the way that the patched layer runs in, if it has tiles."""
        mlp, config, k = self.mlp, self.mlp.runtime.config, self.mlp.budget.context
        if k:  # of the context, or of all tokens
            classes = mlp.runtime.latest_classes_of(mlp.name)
            tokens = self.x.detach() if classes is None else self.x.detach()[classes.context]
            mlp.index.select(tokens, k, config.tile_size, config.tile_order)


def build(kind: str, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": args.intermediate, "num_attention_heads": 1}
    with torch.device(args.device):
        layer = LlamaMLP(LlamaConfig(**sizes)) if args.gated else PlainMLP(args.hidden, args.intermediate)
    layer.to(DTYPES[args.dtype])
    if kind == "dense_lora":
        for name, child in list(layer.named_children()):
            if isinstance(child, nn.Linear):
                setattr(layer, name, LoRALinear(child, args.rank))
    if kind == "subquad":
        patch_model(layer, SubquadConfig(rank=args.rank, active=args.active, tile_size=args.tile))
    return layer.to(args.device).train()


def run_once(layer: nn.Module, x: Tensor, grad: Tensor) -> float:
    """Seconds of one forward and backward, gradients of x and of all trainable parameters included.

    It is the second of two: in training, too, a step follows one of its own kind, whose memory the allocator and the
    caches still hold.
    """
    for _ in range(2):
        layer.zero_grad(set_to_none=True)
        x.grad = None
        seconds = timed(lambda: layer(x).backward(grad), x.device)
    return seconds


def peak_bytes(layer: nn.Module, x: Tensor, grad: Tensor) -> int:
    """Most memory that a forward and backward take beyond what the process holds before them."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    give_back_freed()  # else it would count as held before
    before = resident_bytes() if x.device.type == "cpu" else torch.cuda.memory_allocated()
    peak = PeakMemory(x.device.type)
    peak.start()
    layer(x).backward(grad)
    peak.stop()
    return max(0, peak.bytes - before)


def bench(args: argparse.Namespace, budgets: Mapping[str, Budget] | None = None) -> list[dict[str, Any]]:
    """A row for each budget: medians over interleaved rounds."""
    subjects = Subjects(args, budgets)
    x, grad = subjects.x, subjects.gradient
    times: dict[str, list[float]] = {name: [] for name in subjects.ways}
    selecting: dict[str, list[float]] = {name: [] for name in subjects.ways}
    for _ in range(args.warmup + args.rounds):
        for name in subjects.ways:
            with subjects.way(name) as layer:
                times[name].append(run_once(layer, x, grad))
                selecting[name].append(timed(subjects.select, x.device) if name in subjects.budgets else 0.0)
    rows = []
    for budget in subjects.budgets:
        ours = {"dense_full": "dense_full", "dense_lora": "dense_lora", "subquad": budget}
        seconds = {kind: times[name][args.warmup :] for kind, name in ours.items()}
        seconds["selection"] = selecting[budget][args.warmup :]
        medians = {kind: statistics.median(values) for kind, values in seconds.items()}
        full, lora = (
            statistics.median(a / b for a, b in zip(seconds[kind], seconds["subquad"], strict=True))
            for kind in ("dense_full", "dense_lora")
        )
        row = {
            "budget": budget, "tokens": args.tokens, "hidden": args.hidden, "intermediate": args.intermediate,
            "gated": args.gated, "tile": args.tile, "dtype": args.dtype, "rank": args.rank, "device": args.device,
            "threads": torch.get_num_threads(), "rounds": args.rounds, "round_seconds": seconds,
            **{f"{kind}_seconds": value for kind, value in medians.items()}, "speedup_vs_full": full,
            "speedup_vs_lora": lora, "selection_share": medians["selection"] / medians["subquad"],
        }  # fmt: skip
        for kind, name in ours.items():
            with subjects.way(name) as layer:
                row[f"{kind}_peak_bytes"] = peak_bytes(layer, x, grad)
        with subjects.way(budget):
            rows.append(row | {"active": subjects.mlp.k, "share": subjects.mlp.work_share()})
    return rows


def share_or_count(text: str) -> float | int | None:
    return None if text == "default" else float(text) if "." in text else int(text)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    def grid(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=grid(int), default=[2048])
    parser.add_argument("--hidden", type=grid(int), default=[2048])
    parser.add_argument("--intermediate", type=grid(int), default=[8192])
    parser.add_argument("--active", type=grid(share_or_count), default=[None], help="share or number; default m**0.8")
    parser.add_argument("--tile", type=grid(int), default=[128])
    parser.add_argument("--dtype", type=grid(str), default=["fp32"], help="fp32, bf16")
    parser.add_argument("--rank", type=grid(int), default=[16])
    parser.add_argument("--gated", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--classes", action="store_true", help="classes of tokens, and budgets for them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write the list of rows")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    names = ("tokens", "hidden", "intermediate", "active", "tile", "dtype", "rank")
    rows = []
    for values in tqdm(list(itertools.product(*(getattr(args, name) for name in names))), unit="row"):
        point = argparse.Namespace(**{**vars(args), **dict(zip(names, values, strict=True))})
        for row in bench(point):
            rows.append(row | provenance())
            tqdm.write(
                f"N={row['tokens']} d={row['hidden']} m={row['intermediate']} T={row['tile']} {row['dtype']}, "
                f"{row['budget']}, {row['share']:.1%} of the products: full {row['dense_full_seconds']:.3f}s "
                f"lora {row['dense_lora_seconds']:.3f}s subquad {row['subquad_seconds']:.3f}s = "
                f"{row['speedup_vs_full']:.2f}x / {row['speedup_vs_lora']:.2f}x; "
                f"selection {row['selection_share']:.1%}"
            )
    if args.json:
        write_json(rows, args.json)


if __name__ == "__main__":
    main()
