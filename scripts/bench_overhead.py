"""Cost of a patch where sparse cannot win: a training step of a small model, patched and planned, against unpatched.

Beside it PEFT's cost: LoRA of the same rank on the same projections, the rest trained in full as in the other two.

python scripts/bench_overhead.py --json scripts/results/overhead.json
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from environment import commit, machine, versions
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from hf_subquad import SubquadConfig, apply_plan, calibrate, compensate, patch_model, sync_model


def build(hidden: int, intermediate: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    settings = OPTConfig(
        hidden_size=hidden, ffn_dim=intermediate, num_hidden_layers=layers, num_attention_heads=4, vocab_size=512,
        word_embed_proj_dim=hidden, max_position_embeddings=1024, dropout=0.0,
    )  # fmt: skip
    return OPTForCausalLM(settings)


def with_lora(model: nn.Module) -> nn.Module:
    """PEFT LoRA on the MLPs, whose base weights are frozen; all else stays trainable."""
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=["fc1", "fc2"]))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("base_layer" not in name)
    return adapted


def step_of(model: nn.Module, batch: dict[str, Tensor], patched: bool) -> Callable[[], None]:
    """One training step with fused AdamW, and with what the callback does in it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    done = 0

    def step() -> None:
        nonlocal done
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        if patched:
            sync_model(model, done, optimizer)

    return step


def over(seconds: list[float], others: list[float]) -> float:
    """Median ratio of steps that followed each other."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ids = torch.randint(512, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        plain = build(args.hidden, args.intermediate, args.layers)
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
        for number in range(args.steps + 20):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                if number >= 20:
                    seconds[name].append(time.perf_counter() - started)
        row = {
            "hidden": args.hidden, "intermediate": args.intermediate, "layers": args.layers, "tokens": args.tokens,
            "threads": threads, "planned_dense": sum(layer.dense for layer in plan.layers),
            **{f"{name}_ms_median": 1000 * statistics.median(values) for name, values in seconds.items()},
            "patched_over_unpatched_median": over(seconds["patched"], seconds["unpatched"]),
            "lora_over_unpatched_median": over(seconds["lora"], seconds["unpatched"]),
        }  # fmt: skip
        print(row, flush=True)
        rows.append(row)
    if args.json:
        args.json.write_text(
            json.dumps({"rows": rows, "versions": versions(), "commit": commit(), "machine": machine()}, indent=2)
            + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
