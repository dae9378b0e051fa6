"""The command `hf-subquad`: what a patch would do to a model, and what is installed here."""

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Sequence

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from .config import SubquadConfig
from .errors import SubquadError
from .families import Match, find_mlps

_PACKAGES = ("hf-subquad", "torch", "transformers", "accelerate", "faiss-cpu", "safetensors", "peft")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="hf-subquad", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="list the MLPs that would be patched; loads no weights")
    plan.add_argument("model", help="hub name or local folder")
    plan.add_argument("--config", help="JSON file of SubquadConfig settings")
    commands.add_parser("env", help="print versions and hardware, to paste into an issue")
    options = parser.parse_args(arguments)
    try:
        return print_env() if options.command == "env" else print_plan(options.model, options.config)
    except (SubquadError, OSError, ValueError) as error:
        print(f"hf-subquad: {error}", file=sys.stderr)
        return 1


def print_env() -> int:
    print(f"python       {platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        try:
            print(f"{package:<12} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package:<12} not installed")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    print(f"device       {device or 'cpu'}, {torch.get_num_threads()} threads")
    return 0


def print_plan(name: str, config_file: str | None) -> int:
    """A table of the MLPs that `patch_model` would make sparse. Time and quality are not predicted."""
    config = SubquadConfig()
    if config_file:
        with open(config_file) as file:
            config = SubquadConfig.from_json(file.read())
    settings = transformers.AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        model = getattr(transformers, (settings.architectures or [""])[0], transformers.AutoModel)
        model = model._from_config(settings) if hasattr(model, "_from_config") else model.from_config(settings)
    print(f"{'MLP':<40} {'neurons':>8} {'active':>8} {'share':>7} {'width':>7}")
    for match in find_mlps(model, config):
        neurons, width = _size(match)
        active = config.active_neurons(neurons)
        print(f"{match.name:<40} {neurons:>8} {active:>8} {active / neurons:>7.1%} {width:>7}")
    return 0


def _size(match: Match) -> tuple[int, int]:
    """Neurons m and hidden size d, from the output projection: Conv1D stores [m, d], Linear [d, m]."""
    output = match.projection(match.family.output)
    first, second = output.weight.shape
    return (first, second) if isinstance(output, Conv1D) else (second, first)


if __name__ == "__main__":
    sys.exit(main())
