"""Cost of a patch where sparse cannot win: a training step of a small model, patched and planned, against unpatched.

    python scripts/benchmarks/overhead.py --json out/overhead.json

Beside it PEFT's cost: LoRA of the same rank on the same projections, the rest trained in full as in the other two.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reporting import conclude

from hf_subquad import SubquadConfig, apply_plan, calibrate, compensate, patch_model, sync_model

_WARMUP = 20  # steps


def build(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=args.hidden, ffn_dim=args.intermediate, num_hidden_layers=args.layers, num_attention_heads=4,
            vocab_size=512, word_embed_proj_dim=args.hidden, max_position_embeddings=1024, dropout=0.0,
        )
    )  # fmt: skip


def with_lora(model: nn.Module) -> nn.Module:
    """PEFT LoRA on the MLPs, whose base weights are frozen; all else stays trainable."""
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=["fc1", "fc2"]))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("base_layer" not in name)
    return adapted


def step_of(model: nn.Module, batch: dict[str, Tensor], patched: bool) -> Callable[[int], None]:
    """One training step with fused AdamW, and with what the callback does in it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step(number: int) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if patched:
            sync_model(model, number, optimizer)

    return step


def measure(args: argparse.Namespace) -> dict[str, object]:
    """One row; ratios are medians over steps that followed each other."""
    ids = torch.randint(512, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    plain = build(args)
    patched = patch_model(copy.deepcopy(plain), SubquadConfig(layers_to_transform="all"))
    plan = calibrate(patched, [batch, batch])
    apply_plan(patched, plan)
    compensate(patched, [batch])
    steps = {
        "unpatched": step_of(plain, batch, False),
        "patched": step_of(patched, batch, True),
        "lora": step_of(with_lora(copy.deepcopy(plain)), batch, False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(1, _WARMUP + args.steps + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step(number)
            seconds[name].append(time.perf_counter() - started)
    timed = {name: values[_WARMUP:] for name, values in seconds.items()}
    ratios = {
        f"{name}_over_unpatched_median": statistics.median(
            a / b for a, b in zip(timed[name], timed["unpatched"], strict=True)
        )
        for name in ("patched", "lora")
    }
    return {
        "hidden": args.hidden, "intermediate": args.intermediate, "layers": args.layers, "tokens": args.tokens,
        "threads": torch.get_num_threads(), "planned_dense": sum(layer.dense for layer in plan.layers),
        **{f"{name}_ms_median": 1000 * statistics.median(values) for name, values in timed.items()}, **ratios,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 128), ("intermediate", 512), ("layers", 4), ("tokens", 64), ("steps", 300)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        rows.append(measure(args))
    conclude({"rows": rows}, "\n".join(map(str, rows)), args)


if __name__ == "__main__":
    main()
