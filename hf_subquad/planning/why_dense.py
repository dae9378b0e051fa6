"""Why a plan leaves an MLP dense."""

from collections.abc import Sequence

from .allocation import Option


def why_dense(chosen: Option, options: Sequence[Option], little_gained: bool) -> str:
    """Why an MLP computes all neurons for all tokens, in a few words; empty if it does not.

    Args:
        options: the undominated ones; their costs are shares of what may be lost.
        little_gained: the fastest plan within the limits was too little faster to be used.
    """
    if not chosen.budget.all_neurons:
        return ""
    fewer = [option.cost for option in options if not option.budget.all_neurons]
    if not fewer:
        return "not faster"
    if min(fewer) > 1:
        return "too inexact"
    return "little gained" if little_gained else "others gain more"
