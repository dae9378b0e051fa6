"""Where the MLPs are: one table of projection names, and the search for them in a model."""

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from torch import nn

from .config import SubquadConfig
from .errors import NoMatchError

Gate = Literal["none", "separate", "stacked"]


@dataclass(frozen=True)
class Family:
    """Names of an MLP's projections below the module that calls them.

    Attributes:
        inputs: the projection(s) into neurons, the activated one first.
        output: the projection out of neurons.
        gate: neurons are activation(input); or activation(gate) * up with two projections ('separate') or with
            gate rows over up rows in one ('stacked').
        examples: model types, for people.
    """

    inputs: tuple[str, ...]
    output: str
    gate: Gate
    examples: str


FAMILIES = (
    Family(("gate_proj", "up_proj"), "down_proj", "separate", "Llama, Mistral, Qwen, Gemma"),
    Family(("gate_up_proj",), "down_proj", "stacked", "Phi-3, GLM"),
    Family(("wi_0", "wi_1"), "wo", "separate", "T5 v1.1, Flan-T5, mT5"),
    Family(("wi",), "wo", "none", "T5"),
    Family(("fc1",), "fc2", "none", "OPT, BART, Whisper, ViT"),
    Family(("c_fc",), "c_proj", "none", "GPT-2"),
    Family(("dense_h_to_4h",), "dense_4h_to_h", "none", "GPT-NeoX"),
    Family(("intermediate.dense",), "output.dense", "none", "BERT, RoBERTa, ELECTRA"),
)

_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "intermediate_act_fn", "activation")


@dataclass(frozen=True)
class Match:
    """An MLP found in a model: `parent` calls the projections `family.inputs` and `family.output`."""

    name: str
    parent: nn.Module
    family: Family

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the projections below the parent, the output last."""
        return (*self.family.inputs, self.family.output)

    def projection(self, path: str) -> nn.Module:
        return self.parent.get_submodule(path)

    def full_name(self, path: str) -> str:
        return f"{self.name}.{path}" if self.name else path


def find_mlps(model: nn.Module, config: SubquadConfig) -> list[Match]:
    """The MLPs that `config` asks for, in the model's order.

    Raises:
        NoMatchError: none, or a name or layer number in `config` that the model does not have.
    """
    found = [
        Match(name, module, family)
        for name, module in model.named_modules()
        for family in FAMILIES
        if all(_has(module, path) for path in (*family.inputs, family.output))
    ]
    if not found:
        raise NoMatchError(f"no MLP found in {type(model).__name__}. {_what_is_there(model)}")
    named, in_layers = _by_target(found, config.target_modules), _by_layer(found, config)
    kept = [match for match in named if match in in_layers]
    if not kept:
        raise NoMatchError(
            f"nothing is left to patch: target_modules={config.target_modules} names MLPs in "
            f"{[match.name for match in named]}, layers_to_transform={config.layers_to_transform!r} takes those in "
            f"{[match.name for match in in_layers]}; layers_to_transform='all' takes every layer"
        )
    return kept


def find_activation(match: Match) -> nn.Module | None:
    """The elementwise activation between the projections, by its usual names beside them."""
    holders = [match.parent] + [
        match.parent.get_submodule(path.rpartition(".")[0]) for path in match.family.inputs if "." in path
    ]
    for holder in holders:
        for name in _ACTIVATION_NAMES:
            candidate = getattr(holder, name, None)
            if callable(candidate):
                return candidate
    return None


def _has(module: nn.Module, path: str) -> bool:
    for part in path.split("."):
        module = module._modules.get(part)  # type: ignore[assignment]
        if module is None:
            return False
    return True


def _by_target(found: list[Match], targets: list[str] | None) -> list[Match]:
    if targets is None:
        return found
    names = {match.full_name(path): match for match in found for path in match.paths}

    def wanted(full_name: str, target: str) -> bool:
        return full_name == target or full_name.endswith("." + target)

    for target in targets:
        if not any(wanted(name, target) for name in names):
            near = difflib.get_close_matches(target, sorted({path for m in found for path in m.paths}), cutoff=0.4)
            raise NoMatchError(
                f"target_modules: no MLP projection is named {target!r}; "
                f"nearest are {near}, all are {sorted({path for m in found for path in m.paths})}"
            )
    kept = []
    for match in found:
        hits = [any(wanted(match.full_name(path), target) for target in targets) for path in match.paths]
        if any(hits) and not all(hits):
            raise NoMatchError(
                f"target_modules names a part of {match.name or 'the MLP'} only: the projections of an MLP are patched "
                f"together, so name all of {list(match.paths)}"
            )
        if all(hits):
            kept.append(match)
    return kept


def _by_layer(found: list[Match], config: SubquadConfig) -> list[Match]:
    layers = config.layers_to_transform
    if layers == "all":
        return found
    places = [_layer_of(match) for match in found]
    if layers == "all_but_first":
        first = {stack: min(n for s, n in places if s == stack) for stack, n in places if n is not None}
        return [m for m, (stack, n) in zip(found, places, strict=True) if n is None or n > first[stack]]
    there = {n for _, n in places}
    missing = [n for n in layers if n not in there]
    if missing:
        raise NoMatchError(f"layers_to_transform: no MLP in layers {missing}; there are {sorted(there - {None})}")
    return [m for m, (_, n) in zip(found, places, strict=True) if n in layers]


def _layer_of(match: Match) -> tuple[str, int | None]:
    """Stack and number of the layer a match is in, from its path: model.layers.3.mlp is 3 of model.layers."""
    numbered = re.match(r"(.*?)(?:^|\.)(\d+)(?:\.|$)", match.name)
    return (numbered[1], int(numbered[2])) if numbered else (match.name, None)


def _what_is_there(model: nn.Module) -> str:
    names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if not module._modules} - {""})
    known = sorted({path.rpartition(".")[2] for family in FAMILIES for path in (*family.inputs, family.output)})
    near = sorted({hit for name in names for hit in difflib.get_close_matches(name, known, n=1, cutoff=0.7)})
    return (
        f"Searched for modules holding one of "
        f"{[' / '.join((*f.inputs, f.output)) for f in FAMILIES]}. Its leaf modules are named {names[:40]}"
        + (f"; nearest known names: {near}" if near else "")
    )
