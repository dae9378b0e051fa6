"""A head and its cross-entropy in chunks of rows, so that logits exist for only a few rows at a time.

The gradient of the logits, softmax minus one-hot, follows from the logits alone. So the forward pass computes it and
propagates it to the hidden states and the head's parameters, whose gradients are small. A chunk's logits are freed
before those of the next chunk are computed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

MEGABYTE = 2**20


def chunked_cross_entropy(
    head: Callable[[Tensor], Tensor],
    parameters: list[nn.Parameter],
    hidden: Tensor,
    labels: Tensor,
    denominator: Tensor | int,
    vocabulary: int,
    megabytes: int,
    weight: nn.Parameter | None = None,
    kept: list[Tensor] | None = None,
) -> Tensor:
    """Sum of the cross-entropies of head(hidden) with labels, divided by a denominator; float32, as in transformers.

    Args:
        head: maps (rows, width) to (rows, vocabulary), each row by itself.
        parameters: all parameters that the head's output depends on and that take gradients.
        hidden: shape (rows, width), at least one row.
        labels: ids in [0, vocabulary); shape (rows,).
        megabytes: limit on the memory for the logits of a chunk and their gradient; at least one row is computed.
        weight: the weight, if the head is a plain linear layer with or without a bias: its gradient is then summed in
            place, without a matrix of its size for every chunk.
        kept: a list that receives the logits of each chunk, so that they are not freed.

    Raises:
        IndexError: a label lies outside the vocabulary (PyTorch's own error).
    """
    # Logits and log-probabilities in float32; in other dtypes, also the logits and their gradient in that dtype.
    bytes_per_logit = 8 if hidden.dtype == torch.float32 else 8 + 2 * hidden.dtype.itemsize
    rows = max(1, megabytes * MEGABYTE // (vocabulary * bytes_per_logit))
    denominator = torch.as_tensor(denominator, device=hidden.device)
    loss: Tensor = _ChunkedCrossEntropy.apply(head, rows, labels, denominator, weight, kept, hidden, *parameters)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[[Tensor], Tensor],
        rows: int,
        labels: Tensor,
        denominator: Tensor,
        weight: nn.Parameter | None,
        kept: list[Tensor] | None,
        hidden: Tensor,
        *parameters: nn.Parameter,
    ) -> Tensor:
        inputs = (hidden, *parameters)
        needed = ctx.needs_input_grad[6:]
        trained = [position for position, needs in enumerate(needed) if needs]
        gradients: list[Tensor | None] = [None] * len(inputs)
        of_hidden = []
        total = torch.zeros((), device=hidden.device)
        for chunk, targets in zip(hidden.split(rows), labels.split(rows), strict=True):
            chunk = chunk.detach().requires_grad_(needed[0])
            # Without hooks of a checkpoint around it, which would begin to recompute it here.
            with saved_tensors_hooks(_same, _same), torch.set_grad_enabled(bool(trained)):
                logits = head(chunk)
            if kept is not None:
                kept.append(logits.detach())
            log_probabilities = torch.log_softmax(logits.detach().float(), dim=-1)
            total += nn.functional.nll_loss(log_probabilities, targets, reduction="sum")
            if not trained:
                continue
            at_logits = log_probabilities.exp_()
            at_logits[torch.arange(len(targets), device=targets.device), targets] -= 1
            at_logits = at_logits.div_(denominator).to(logits.dtype)
            by_autograd = list(trained)
            if (
                weight is not None
                and weight.requires_grad
                and weight.dtype == chunk.dtype == logits.dtype == total.dtype
            ):
                position = next(position for position in trained if inputs[position] is weight)
                by_autograd.remove(position)
                gradients[position] = _with_product(gradients[position], at_logits, chunk.detach())
            leaves = [chunk if position == 0 else inputs[position] for position in by_autograd]
            found = torch.autograd.grad(logits, leaves, at_logits, allow_unused=True) if leaves else ()
            for position, part in zip(by_autograd, found, strict=True):
                if position == 0:
                    of_hidden.append(part)
                elif part is not None:
                    gradients[position] = _added(gradients[position], part)
            del logits, log_probabilities, at_logits  # before the next chunk's
        if of_hidden:
            gradients[0] = torch.cat(of_hidden)
        ctx.gradients, ctx.dtypes = gradients, [value.dtype for value in inputs]
        return total / denominator

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the labelled head keeps its gradients for one backward pass: call unpatch_head(model) to use "
                "retain_graph=True"
            )
        scaled = (g if g is None else g.mul_(factor).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return *(None,) * 6, *scaled


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    """Sums over chunks are kept in float32 at least."""
    if total is None:
        return part.to(torch.promote_types(part.dtype, torch.float32))
    return total.add_(part)


def _with_product(total: Tensor | None, at_logits: Tensor, hidden: Tensor) -> Tensor:
    return at_logits.t() @ hidden if total is None else total.addmm_(at_logits.t(), hidden)
