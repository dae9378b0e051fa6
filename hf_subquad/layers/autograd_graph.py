"""Finds the leaf tensors, mostly parameters, that other tensors were computed from."""

from collections.abc import Iterable

from torch import Tensor


def leaves_behind(values: Iterable[Tensor]) -> set[int]:
    """Ids of the tensors that values depend on and that collect gradients: parameters, mostly."""
    found, waiting, seen = set(), [value.grad_fn for value in values], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting.extend(following for following, _ in node.next_functions)
    return found
