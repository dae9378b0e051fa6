"""Time one MLP layer, forward and backward: dense fully trained, dense frozen with LoRA, and subquad.

    python scripts/benchmarks/layer.py --tokens 2048 --hidden 2048 --intermediate 8192 --dtype fp32 --json row.json

The three run interleaved, one after the other in every round, and the medians over the rounds are reported; ratios
are medians of the ratios within a round. Weights and tokens are random, which costs the same as pretrained ones.
Several values, separated by commas, make a grid.
"""

import argparse
import ctypes
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comparison.memory import PeakMemory, resident_bytes
from environment import provenance
from reporting import write_json

from hf_subquad import SubquadConfig, patch_model, sparse_mlps
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


class GatedMLP(nn.Module):
    """y = W3 (silu(W1 x) * (W2 x))."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update, as PEFT computes it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def build(kind: str, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    layer = (GatedMLP if args.gated else PlainMLP)(args.hidden, args.intermediate).to(DTYPES[args.dtype])
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


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that a forward keeps for its backward, beyond the input and the parameters."""
    held = {p.untyped_storage().data_ptr() for p in layer.parameters()} | {x.untyped_storage().data_ptr()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


def peak_bytes(layer: nn.Module, x: Tensor, grad: Tensor) -> int:
    """Most memory that a forward and backward take beyond what the process holds before them."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed but kept would count as held before
    before = resident_bytes() if x.device.type == "cpu" else torch.cuda.memory_allocated()
    peak = PeakMemory(x.device.type)
    peak.start()
    layer(x).backward(grad)
    peak.stop()
    return max(0, peak.bytes - before)


def selection_seconds(layer: nn.Module, x: Tensor) -> float:
    mlp = sparse_mlps(layer)[0]
    config = mlp.runtime.config
    return timed(lambda: mlp.index.select(x.detach(), mlp.k, config.tile_size, config.tile_order), x.device)


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """One row: medians over interleaved rounds."""
    device = torch.device(args.device)
    layers = {kind: build(kind, args) for kind in ("dense_full", "dense_lora", "subquad")}
    x = torch.randn(args.tokens, args.hidden, device=device, dtype=DTYPES[args.dtype])
    # Tokens of a real batch resemble each other in groups; random ones do not, and tiles of them cost the same.
    x = F.layer_norm(x, (args.hidden,)).requires_grad_(True)
    grad = torch.randn_like(x)
    times: dict[str, list[float]] = {kind: [] for kind in (*layers, "selection")}
    for round_number in range(args.warmup + args.rounds):
        seconds = {kind: run_once(layer, x, grad) for kind, layer in layers.items()}
        seconds["selection"] = selection_seconds(layers["subquad"], x)
        if round_number >= args.warmup:
            for kind, value in seconds.items():
                times[kind].append(value)
    median = {kind: statistics.median(values) for kind, values in times.items()}
    mlp = sparse_mlps(layers["subquad"])[0]
    memory = {kind: saved_bytes(layer, x) for kind, layer in layers.items()}
    peaks = {kind: peak_bytes(layer, x, grad) for kind, layer in layers.items()}

    def ratio(kind: str) -> float:
        return statistics.median(a / b for a, b in zip(times[kind], times["subquad"], strict=True))

    return {
        "tokens": args.tokens, "hidden": args.hidden, "intermediate": args.intermediate, "gated": args.gated,
        "active": mlp.k, "share": mlp.k / mlp.index.neurons, "tile": args.tile, "dtype": args.dtype,
        "rank": args.rank, "device": args.device, "threads": torch.get_num_threads(), "rounds": args.rounds,
        "dense_full_seconds": median["dense_full"], "dense_lora_seconds": median["dense_lora"],
        "subquad_seconds": median["subquad"],
        "selection_seconds": median["selection"],
        "speedup_vs_full": ratio("dense_full"), "speedup_vs_lora": ratio("dense_lora"),
        "selection_share": median["selection"] / median["subquad"],
        "seconds_range": {kind: [min(values), max(values)] for kind, values in times.items()},
        "round_seconds": times,
        **{f"{kind}_saved_bytes": value for kind, value in memory.items()},
        **{f"{kind}_peak_bytes": value for kind, value in peaks.items()},
        "saved_share_of_dense": memory["subquad"] / memory["dense_full"],
    }  # fmt: skip


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
        row = {**bench(point), **provenance()}
        rows.append(row)
        tqdm.write(
            f"N={row['tokens']} d={row['hidden']} m={row['intermediate']} k={row['active']} T={row['tile']} "
            f"{row['dtype']}: full {row['dense_full_seconds']:.3f}s lora {row['dense_lora_seconds']:.3f}s "
            f"subquad {row['subquad_seconds']:.3f}s = {row['speedup_vs_full']:.2f}x / {row['speedup_vs_lora']:.2f}x; "
            f"selection {row['selection_share']:.1%}, saved {row['saved_share_of_dense']:.0%} of dense"
        )
    if args.json:
        write_json(rows, args.json)


if __name__ == "__main__":
    main()
