"""Finds the MLPs of a model by the names of their projections, from one table."""

import difflib
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from ..config import SubquadConfig
from ..errors import NoMatchError
from ..weights.quantized import is_4bit

# Paths of an MLP's projections, relative to the module that calls them: the projection(s) into neurons, the activated
# one first, then the projection out of neurons. A module matches the first row whose names it has.
FAMILIES = (
    ("gate_proj.linear", "up_proj.linear", "down_proj.linear"),  # Gemma 4 vision
    ("gate_proj", "up_proj", "down_proj"),  # Llama, Mistral, Qwen, Gemma
    ("gate_up_proj", "down_proj"),  # Phi-3, GLM
    ("up_proj", "down_proj"),  # Nemotron, Arcee, MPT, DINOv3
    ("wi_0", "wi_1", "wo"),  # T5 v1.1, Flan-T5, mT5
    ("wi", "wo"),  # T5, Switch Transformers
    ("Wi", "Wo"),  # ModernBERT
    ("w1", "w3", "w2"),  # LFM2
    ("fc1", "fc2"),  # OPT, BART, Whisper, ViT
    ("c_fc", "c_proj"),  # GPT-2
    ("fc_in", "fc_out"),  # GPT-J, CodeGen
    ("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, Bloom, Falcon
    ("intermediate.dense", "output.dense"),  # BERT, RoBERTa, ELECTRA
    ("intermediate_dense", "output_dense"),  # Wav2Vec2, HuBERT
    ("ffn", "ffn_output"),  # ALBERT
    ("lin1", "lin2"),  # DistilBERT, XLM, SAM
    ("linear1", "linear2"),  # Parakeet
    ("linear_1", "linear_2"),  # Funnel
    ("layer_1", "layer_2"),  # XLNet
    ("linear_fc1", "linear_fc2"),  # Qwen-VL
    ("proj_in", "proj_out"),  # SAM 2
)

_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "intermediate_act_fn", "activation", "activation_function")
_COMMON_ACTIVATIONS = ("relu", "gelu", "gelu_pytorch_tanh", "silu", "relu2", "quick_gelu")


@dataclass(frozen=True)
class Match:
    """An MLP found in a model: `parent` calls the projections at `paths` below it, the one out of neurons last."""

    name: str
    parent: nn.Module
    paths: tuple[str, ...]

    def projection(self, path: str) -> nn.Module:
        return self.parent.get_submodule(path)

    def full_name(self, path: str) -> str:
        return f"{self.name}.{path}" if self.name else path

    @property
    def stacked(self) -> bool:
        """Neurons are activation(gate) * up, and one projection stacks the gate rows above the up rows."""
        return len(self.paths) == 2 and linear_sizes(self.projection(self.paths[0]))[1] == 2 * self.neurons

    @property
    def gated(self) -> bool:
        """Neurons are activation(gate) * up, with one or two input projections; else they are activation(input)."""
        return len(self.paths) == 3 or self.stacked

    @property
    def neurons(self) -> int:
        """m."""
        return linear_sizes(self.projection(self.paths[-1]))[0]


def linear_sizes(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear projection."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def find_mlps(model: nn.Module, config: SubquadConfig) -> list[Match]:
    """The MLPs that `config` selects, in the model's order.

    Raises:
        NoMatchError: there are none, or `config` has a name or layer number that the model does not have.
    """
    model = bare_model(model)
    matches = _matches(model)
    found = [match for match in matches if _may_be_wide(match)]
    if not found:
        why = _why_none(model, matches)
        raise NoMatchError(f"no wide MLP found in {type(model).__name__}{why}. {_what_is_there(model)}")
    named, in_layers = _by_target(found, config.target_modules), _by_layer(found, config)
    not_excluded = _not_excluded(found, config.exclude_modules)
    kept = [match for match in named if match in in_layers and match in not_excluded]
    if not kept:
        raise NoMatchError(
            f"nothing is left to patch: target_modules={config.target_modules} names MLPs in "
            f"{[match.name for match in named]}, layers_to_transform={config.layers_to_transform!r} takes those in "
            f"{[match.name for match in in_layers]}, exclude_modules={config.exclude_modules} leaves those in "
            f"{[match.name for match in not_excluded]}; layers_to_transform='all' takes every layer"
        )
    return kept


def bare_model(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper, if any, so that names do not depend on which was applied first."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def find_activations(match: Match) -> list[Callable[[Tensor], Tensor]]:
    """Candidates for the activation: an attribute with a usual name beside the projections, else common ones."""
    holders = [match.parent, *(match.parent.get_submodule(path.rpartition(".")[0]) for path in match.paths[:-1])]
    beside = (getattr(holder, name, None) for holder in holders for name in _ACTIVATION_NAMES)
    found: Any = next(filter(callable, beside), None)
    return [ACT2FN[name] for name in _COMMON_ACTIVATIONS] if found is None else [found]


def _matches(model: nn.Module) -> list[Match]:
    """MLPs of a known family, wide or not."""
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    return [match for name, module in model.named_modules() if (match := _match(name, module, names))]


def _match(name: str, module: nn.Module, names: set[str]) -> Match | None:
    """The first family of which a module has all projections, given the names of all modules."""
    matches = (Match(name, module, paths) for paths in FAMILIES)
    return next((match for match in matches if all(match.full_name(path) in names for path in match.paths)), None)


def _may_be_wide(match: Match) -> bool:
    """Whether inputs and outputs have the same width and there are more neurons; True if a projection is not plain."""
    projections = [match.projection(path) for path in match.paths]
    if not all(type(projection) in (nn.Linear, Conv1D) or is_4bit(projection) for projection in projections):
        return True
    *inputs, (neurons, outputs) = map(linear_sizes, projections)
    rows = (neurons,) if len(inputs) == 2 else (neurons, 2 * neurons)
    return all(into in rows and width == outputs < neurons for width, into in inputs)


def _by_target(found: list[Match], targets: list[str] | None) -> list[Match]:
    """The matches that the targets name. A target is the path of a projection or the end of it, as in PEFT."""
    if targets is None:
        return found
    for target in targets:
        if not any(f".{match.full_name(path)}".endswith(f".{target}") for match in found for path in match.paths):
            known = sorted({path for m in found for path in m.paths})
            near = difflib.get_close_matches(target, known, cutoff=0.4)
            raise NoMatchError(
                f"target_modules: no MLP projection is named {target!r}; nearest are {near}, all are {known}"
            )
    kept = []
    for match in found:
        hits = [any(f".{match.full_name(path)}".endswith(f".{target}") for target in targets) for path in match.paths]
        if any(hits) and not all(hits):
            raise NoMatchError(
                f"target_modules names only a part of {match.name or 'the MLP'}: the projections of an MLP are patched "
                f"together, so name all of {list(match.paths)}"
            )
        if all(hits):
            kept.append(match)
    return kept


def _not_excluded(found: list[Match], excluded: list[str] | None) -> list[Match]:
    kept = found
    for name in excluded or []:
        # A name is the end of the path to a projection, or to a module that holds it.
        hit = [m for m in found if any(f".{name}." in f".{m.full_name(path)}." for path in m.paths)]
        if not hit:
            parts = {part for m in found for path in m.paths for part in m.full_name(path).split(".")}
            names = sorted(part for part in parts if not part.isdigit())
            near = difflib.get_close_matches(name.rpartition(".")[2], names, cutoff=0.4)
            raise NoMatchError(
                f"exclude_modules: there is no wide MLP in a module named {name!r}; nearest are {near}, all are {names}"
            )
        kept = [match for match in kept if match not in hit]
    return kept


def _by_layer(found: list[Match], config: SubquadConfig) -> list[Match]:
    layers = config.layers_to_transform
    if layers == "all":
        return found
    places = [_layer_of(match) for match in found]
    if layers == "all_but_first":
        numbered = [(stack, n) for stack, n in places if n is not None]
        first = {stack: min(n for s, n in numbered if s == stack) for stack, _ in numbered}
        return [m for m, (stack, n) in zip(found, places, strict=True) if n is None or n > first[stack]]
    there = {n for _, n in places if n is not None}
    missing = [n for n in layers if n not in there]
    if missing:
        raise NoMatchError(f"layers_to_transform: no MLP in layers {missing}; there are {sorted(there)}")
    return [m for m, (_, n) in zip(found, places, strict=True) if n in layers]


def _layer_of(match: Match) -> tuple[str, int | None]:
    """Stack and number of the layer a match is in, from its path: model.layers.3.mlp is 3 of model.layers."""
    numbered = re.match(r"(.*?)(?:^|\.)(\d+)(?:\.|$)", match.name)
    return (numbered[1], int(numbered[2])) if numbered else (match.name, None)


def cannot_be_patched(model: nn.Module) -> str:
    """MLPs of an unpatched model that no setting selects, as a message; empty if there are none."""
    kinds = {
        "experts in 3-D parameters": fused_experts(model),
        "MLPs that do not widen": [match.name for match in _matches(model) if not _may_be_wide(match)],
    }
    found = [f"{kind} ({names[0]}: {len(names)} in all)" for kind, names in kinds.items() if names]
    return f"{' and '.join(found)} cannot be patched and run as before" if found else ""


def fused_experts(model: nn.Module) -> list[str]:
    """Names of 3-D parameters that contain the MLPs of several experts."""
    return [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "expert" in name]


def _widening_pair(model: nn.Module) -> str | None:
    """Names of the first two projections side by side of which one widens and the other narrows again."""
    for name, module in model.named_modules():
        sizes = {n: linear_sizes(child) for n, child in module._modules.items() if type(child) in (nn.Linear, Conv1D)}
        for (first, (width, neurons)), (second, back) in itertools.permutations(sizes.items(), 2):
            if back == (neurons, width) and neurons > width:
                return f"{name}.{first} / {second}"
    return None


def _why_none(model: nn.Module, narrow: list[Match]) -> str:
    if experts := fused_experts(model):
        return f": its experts share 3-D parameters ({experts[0]}), which cannot be patched"
    if narrow:
        paths = " / ".join(narrow[0].paths)
        return f": {narrow[0].name} ({paths}) does not have more neurons than inputs and as many outputs as inputs"
    if pair := _widening_pair(model):
        return f": {pair} are not known names of an MLP's projections"
    return ", and no pair of linear projections that could be one"


def _what_is_there(model: nn.Module) -> str:
    names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if not module._modules} - {""})
    known = sorted({path.rpartition(".")[2] for paths in FAMILIES for path in paths})
    near = sorted({hit for name in names for hit in difflib.get_close_matches(name, known, n=1, cutoff=0.7)})
    return (
        f"Searched for modules holding one of {[' / '.join(paths) for paths in FAMILIES]}. "
        f"Its leaf modules are named {names[:40]}" + (f"; nearest known names: {near}" if near else "")
    )
