"""The command `hf-subquad`: shows what a patch would do to a model, and what is installed here."""

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import send_to_device

from .config import SubquadConfig
from .errors import SubquadError
from .patching.mlp_patterns import find_mlps, linear_sizes
from .planning.make_plan import calibrate
from .planning.text_batches import read_text, text_batches

_PACKAGES = ("hf-subquad", "torch", "triton", "transformers", "accelerate", "faiss-cpu", "safetensors", "peft")
_BATCHES = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="hf-subquad", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser(
        "plan",
        help="show what would be patched; with --data, also the budgets and the predicted speed",
        description="Without --data, list the MLPs that would be patched; no weights are loaded. With --data, load the "
        "model and plan: measure on this machine what each MLP can skip, and what that saves.",
    )
    plan.add_argument("model", help="hub name or local folder")
    plan.add_argument("--config", help="JSON file of SubquadConfig settings")
    plan.add_argument("--data", type=Path, help="text to calibrate on: .txt, or .jsonl with --column")
    plan.add_argument("--column", default="text", help="text column of a .jsonl file (default: text)")
    plan.add_argument("--batch-size", type=int, default=8, help="sequences per training batch (default: 8)")
    plan.add_argument("--length", type=int, default=256, help="tokens per sequence (default: 256)")
    plan.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    plan.add_argument("--device", default=_device(), help="default: %(default)s")
    plan.add_argument("--save", type=Path, help="write the plan as JSON, for patch_model(model, config, plan=...)")
    commands.add_parser("env", help="print versions and hardware, for a bug report")
    options = parser.parse_args(arguments)
    if options.command == "plan" and options.save and options.data is None:
        parser.error("--save needs --data: without data, nothing is planned")
    try:
        if options.command == "env":
            print_env()
        elif options.data is None:
            print_mlps(options.model, _config(options.config))
        else:
            print_plan(options, _config(options.config))
    except (SubquadError, OSError, ValueError) as error:
        print(f"hf-subquad: {error}", file=sys.stderr)
        return 1
    return 0


def print_env() -> None:
    print(f"python       {platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        try:
            print(f"{package:<12} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package:<12} not installed")
    print(f"device       {_device()}, {torch.get_num_threads()} threads")


def print_mlps(name: str, config: SubquadConfig) -> None:
    """A table of the MLPs that `patch_model` would make sparse. Time and quality are not predicted."""
    with torch.device("meta"):
        settings = transformers.AutoConfig.from_pretrained(name)
        model_class = _model_class(settings)
        build = getattr(model_class, "_from_config", None) or model_class.from_config
        model = build(settings)
    print(f"{'MLP':<40} {'neurons':>8} {'active':>8} {'share':>7} {'width':>7}")
    for match in find_mlps(model, config):
        neurons, width = linear_sizes(match.projection(match.paths[-1]))
        active = config.active_neurons(neurons)
        print(f"{match.name:<40} {neurons:>8} {active:>8} {active / neurons:>7.1%} {width:>7}")
    print("These are the budgets before planning: add --data FILE to plan them.")


def print_plan(options: argparse.Namespace, config: SubquadConfig) -> None:
    """Calibrate on text and print the plan."""
    text = read_text(options.data, options.column)
    settings = transformers.AutoConfig.from_pretrained(options.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    batches = text_batches(text, tokenizer, options.batch_size, options.length, _BATCHES, settings.is_encoder_decoder)
    model = _model_class(settings).from_pretrained(options.model, dtype=options.dtype).to(options.device)
    plan = calibrate(model, send_to_device(batches, options.device), config)
    print(plan.table())
    if options.save:
        plan.save(options.save)


def _config(path: str | None) -> SubquadConfig:
    return SubquadConfig.from_json(Path(path).read_text(encoding="utf-8")) if path else SubquadConfig()


def _model_class(settings: Any) -> Any:
    """The class that the checkpoint was saved from, with its head."""
    return getattr(transformers, (settings.architectures or [""])[0], transformers.AutoModel)


def _device() -> str:
    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
