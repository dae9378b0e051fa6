"""Training steps with the head on labelled positions, against the stock head: seconds, peak memory, loss.

    python scripts/benchmarks/head.py --model CHECKPOINT --data gsm8k/train.jsonl --dtype fp32 --json head.json

Questions are prompts without loss, answers carry it; batches are padded to their longest row, as the default collator
does. Every round runs each variant once, in a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comparison.memory import PeakMemory
from reporting import conclude

from hf_subquad import patch_head

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def batches_of(args: argparse.Namespace) -> list[dict[str, Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    lines = args.data.read_text(encoding="utf-8").splitlines()[: args.batch_size * args.steps]
    rows = []
    for line in map(json.loads, lines):
        prompt = tokenizer(f"Question: {line['question']}\nAnswer: ")["input_ids"]
        answer = [*tokenizer(line["answer"])["input_ids"], tokenizer.eos_token_id]
        rows.append(((prompt + answer)[: args.max_length], ([-100] * len(prompt) + answer)[: args.max_length]))
    return [collated(rows[at : at + args.batch_size]) for at in range(0, len(rows), args.batch_size)]


def collated(rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    length = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
    }


def measure(args: argparse.Namespace, method: str, head: str) -> dict[str, Any]:
    """Steps of one variant; then its head and loss alone, forward and backward, on the hidden states of a batch."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype], attn_implementation="sdpa")
    root = model
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    model.train()
    if head == "labelled":
        patch_head(model, args.megabytes)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    batches = batches_of(args)
    memory, seconds, losses = PeakMemory("cpu"), [], []
    for number, batch in enumerate([batches[0], *batches]):  # the first is a warm-up
        memory.start()
        started = time.perf_counter()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number:
            seconds.append(time.perf_counter() - started)
            losses.append(loss.item())
            memory.stop()
    return {
        "method": method,
        "head": head,
        "step_seconds": seconds,
        "losses": losses,
        "peak_memory_bytes": memory.bytes,
        "head_and_loss_seconds": head_and_loss_seconds(root, batches[0], args.steps),
        "labelled_share": statistics.mean((b["labels"] != -100).float().mean().item() for b in batches),
    }


def head_and_loss_seconds(model: nn.Module, batch: dict[str, Tensor], times: int) -> list[float]:
    with torch.no_grad():
        hidden = model.base_model(batch["input_ids"], batch["attention_mask"], use_cache=False).last_hidden_state
    hidden.requires_grad_()
    model.base_model.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden)
    seconds = []
    for _ in range(times + 1):
        started = time.perf_counter()
        model(**batch, use_cache=False).loss.backward()
        seconds.append(time.perf_counter() - started)
        model.zero_grad()
    return seconds[1:]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians by method and head, and the ratios that count."""
    found: dict[str, Any] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        of = {}
        for head in ("stock", "labelled"):
            runs = [row for row in rows if (row["method"], row["head"]) == (method, head)]
            of[head] = {
                "step_seconds_median": statistics.median(s for run in runs for s in run["step_seconds"]),
                "head_and_loss_seconds_median": statistics.median(s for r in runs for s in r["head_and_loss_seconds"]),
                "peak_memory_bytes": statistics.median(run["peak_memory_bytes"] for run in runs),
                "losses": runs[0]["losses"],
            }
        stock, ours = of["stock"], of["labelled"]
        found[method] = {
            **of,
            "step_speedup": stock["step_seconds_median"] / ours["step_seconds_median"],
            "head_and_loss_speedup": stock["head_and_loss_seconds_median"] / ours["head_and_loss_seconds_median"],
            "peak_memory_saved_share": 1 - ours["peak_memory_bytes"] / stock["peak_memory_bytes"],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal LM whose body is `base_model`")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with 'question' and 'answer'")
    parser.add_argument("--methods", nargs="+", choices=("vanilla", "lora"), default=["vanilla", "lora"])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "HEAD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args, *args.one)))
        return
    rows = []
    for _ in range(args.rounds):
        for method in args.methods:
            for head in ("stock", "labelled"):
                command = [sys.executable, __file__, *sys.argv[1:], "--one", method, head]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(method, head, statistics.median(rows[-1]["step_seconds"]), rows[-1]["peak_memory_bytes"])
    report = {"summary": summary(rows), "rows": rows}
    args.data = str(args.data)
    conclude(report, json.dumps(report["summary"], indent=2), args)


if __name__ == "__main__":
    main()
