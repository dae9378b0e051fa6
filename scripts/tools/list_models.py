"""Try every model type of the installed transformers, tiny and with random weights, and list the outcomes.

    python scripts/tools/list_models.py                   write docs/models.md
    python scripts/tools/list_models.py llama bert        print the rows of some types

Each model that can be patched is proved to be the same one (`tests/helpers/proof.py`); one that is not is an error.
"""

import argparse
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests"))

from helpers.proof import CONFIG, NotComparedError, prove
from helpers.tiny_models import NotBuiltError, class_name, model_types, outline, tiny_batch, tiny_model

from hf_subquad import NoMatchError, UnsupportedModuleError, patch_model, sparse_mlps
from hf_subquad.layers.sparse_mlp import SparseMLP
from hf_subquad.patching.mlp_patterns import find_mlps, fused_experts

PAGE = REPOSITORY / "docs" / "models.md"


@dataclass(frozen=True)
class Section:
    """Model types with the same outcome.

    Attributes:
        columns: of its table, after the model type and its class.
    """

    title: str
    text: str
    columns: tuple[str, ...]


SECTIONS = {
    "sparse": Section(
        "Made sparse",
        "Patched and compared in float64: outputs and all gradients equal those of the plain model with the same "
        "neurons masked, at a quarter of the neurons and at all of them; what `save_pretrained` writes loads into the "
        "plain class and gives the dense outputs; `unpatch_model` restores the same bits. MLPs that the inputs do "
        "not reach (those of images where the input is text, say) passed only the self-test at patch time.",
        ("projections", "MLPs compared", "left dense"),
    ),
    "tested": Section(
        "Made sparse, by the self-test alone",
        "Patched, but not compared: the script knows no inputs that the whole model runs on.",
        ("projections", "why not compared"),
    ),
    "refused": Section(
        "Refused",
        "`patch_model` raises `UnsupportedModuleError` for the first MLP that cannot be made sparse. If the "
        "model's other MLPs can be made sparse, exclude the one that the message names with `exclude_modules`.",
        ("reason",),
    ),
    "none": Section(
        "Nothing to patch",
        "`patch_model` raises `NoMatchError`: there are convolutions, state spaces, experts in 3-D parameters, or "
        "names that the table of families does not have.",
        ("reason",),
    ),
    "not built": Section("Not tried", "The script could not build a tiny model.", ("reason",)),
}


@dataclass(frozen=True)
class Verdict:
    """What came of a model type: a row of the table of a section."""

    model_type: str
    section: str
    cells: tuple[str, ...]

    @property
    def row(self) -> str:
        return f"| {' | '.join((self.model_type, class_name(self.model_type), *self.cells))} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; without any, all of them, and the page is written")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # tiny configurations draw remarks
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    verdicts, wrong = [], []
    for model_type in options.types or model_types():
        try:
            verdicts.append(verdict(model_type))
            print(f"{verdicts[-1].section:<10} {verdicts[-1].row}", flush=True)
        except Exception as error:
            wrong.append(model_type)
            print(f"WRONG      {model_type}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if wrong:
        print(f"{len(wrong)} types are patched wrongly: {', '.join(wrong)}", file=sys.stderr)
        return 1
    if not options.types:
        PAGE.write_text(page(verdicts), encoding="utf-8")
    return 0


def verdict(model_type: str) -> Verdict:
    """Build, patch and prove a model type.

    Raises:
        AssertionError: the patched model is not the same one.
    """
    try:
        find_mlps(outline(model_type), CONFIG)
        model = tiny_model(model_type)
        patched = patch_model(tiny_model(model_type), CONFIG)
    except NotBuiltError as error:
        return Verdict(model_type, "not built", (_cell(error),))
    except NoMatchError as error:
        return Verdict(model_type, "none", (_cell(error),))
    except UnsupportedModuleError as error:
        return Verdict(model_type, "refused", (_cell(error),))
    mlps = sparse_mlps(patched)
    projections = ", ".join(sorted({_projections(mlp) for mlp in mlps}))
    try:
        reached = prove(model, tiny_batch(model))
    except (NotBuiltError, NotComparedError) as error:
        return Verdict(model_type, "tested", (projections, _cell(error)))
    experts = "experts" if fused_experts(model) else ""
    return Verdict(model_type, "sparse", (projections, f"{len(reached)} of {len(mlps)}", experts))


def page(verdicts: Iterable[Verdict]) -> str:
    verdicts = list(verdicts)
    parts = [
        "# Model types",
        f"All model types of transformers {transformers.__version__} that have a model class. Each is built tiny and "
        "with random weights by `python scripts/tools/list_models.py`. One class represents each type, with default "
        "settings except for sizes.",
    ]
    for name, section in SECTIONS.items():
        rows = [verdict.row for verdict in verdicts if verdict.section == name]
        columns = ("type", "class", *section.columns)
        head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        parts += [f"## {section.title}: {len(rows)}", section.text, "\n".join(head + rows)]
    return "\n\n".join(parts) + "\n"


def _projections(mlp: SparseMLP) -> str:
    *inputs, output = mlp.sources
    stacked = mlp.inputs[0].shape[0] > mlp.index.neurons
    kind = "gate and up" if len(inputs) == 2 else "gate and up in one" if stacked else "plain"
    return f"`{'`, `'.join(inputs)}` / `{output}` ({kind})"


def _cell(error: Exception) -> str:
    """The first sentence of an error, fit for a table."""
    text = str(error).splitlines()[0].replace("|", "/")
    return re.split(r"\. (?=[A-Z])", text)[0]


if __name__ == "__main__":
    sys.exit(main())
