"""Checks, at patch time, that an MLP computes the same on compact activations."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModuleError
from ..index.selection_quality import exact_activations
from ..layers.dense_or_sparse import dense_forward, sparse_forward
from ..layers.preserve_mode_and_rng import evaluating
from ..layers.sparse_mlp import InputProjection, SparseMLP
from ..ops.group_tokens import Selection, TokenTiles
from ..ops.mlp_products import Part

_BATCH, _TOKENS = 2, 9
_SMALLER = 0.3  # hidden states of the tokens with all neurons
_RESIDUALS = ("residual", "input_tensor")  # what an MLP adds its output to


@torch.no_grad()
def self_test(mlp: SparseMLP, activations: Sequence[Callable[[Tensor], Tensor]]) -> None:
    """Run an MLP with half of the neurons for half of the tokens, and dense with the other ones masked, then with the
    other half: the results must agree.

    That exposes anything between the projections that mixes neurons (a norm over them, a top-k among them) or tokens.
    The tokens with all neurons are smaller than the others, so one of the halves lacks the largest activation. The
    candidates for the activation that scores neurons are compared with what the model computed: the index keeps the
    first one that agrees.

    Some parents cannot be run alone, because their attention needs more than hidden states. If their projections are
    in two separate modules, as in BERT, these are run one after the other.

    Raises:
        UnsupportedModuleError: the results differ, or the module that calls the projections cannot be run by itself.
    """
    device, dtype = mlp.inputs[0].weight.device, _dtype(mlp)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_BATCH, _TOKENS, mlp.inputs[0].shape[1], generator=generator, dtype=torch.float32, device="cpu")
    x[0] *= _SMALLER
    x = x.to(device, dtype)
    neurons = mlp.index.neurons
    whole, others = torch.arange(_BATCH * _TOKENS, device=device).view(_BATCH, _TOKENS)
    tile = TokenTiles(torch.arange(_TOKENS, device=device).unsqueeze(0), _TOKENS)
    mask = torch.ones(_BATCH, _TOKENS, neurons, device=device, dtype=dtype)  # of what the output projection sees
    called: list[tuple[InputProjection, Tensor]] = []  # input projections, in order, and what they are called on
    activated: list[Tensor] = []

    def note_call(module: InputProjection, args: tuple[Tensor]) -> None:
        called.append((module, args[0]))

    def masked(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        return args[0] * mask.view_as(args[0])

    otherwise = "the code between its projections does not run on a subset of its neurons"
    with evaluating(mlp.parent):
        with dense_forward(mlp.parent), ExitStack() as hooks:
            for projection in mlp.inputs:
                hooks.enter_context(projection.register_forward_pre_hook(note_call))
            hooks.enter_context(mlp.output.register_forward_pre_hook(masked))
            run = _runnable(mlp, x)
        if not called:
            raise _refusal(mlp, "run by itself, it does not call its projections")
        called = called[-len(mlp.inputs) :]  # what a failed attempt called comes before
        mlp.opens, seen = called[0]
        mlp.shares_input = all(other is seen for _, other in called)
        for half in torch.randperm(neurons, generator=generator, device="cpu").to(device).tensor_split(2):
            mask[1] = torch.zeros_like(mask[1]).index_fill_(1, half, 1)
            parts = [Part(whole, _TOKENS), Part(others, _TOKENS, Selection(tile, half.unsqueeze(0)))]
            with dense_forward(mlp.parent), mlp.output.register_forward_pre_hook(masked):
                expected = _attempt(mlp, run, x, otherwise)
            noted = mlp.output.register_forward_pre_hook(lambda _, args: activated.append(args[0]))
            with sparse_forward(mlp.parent), mlp.using(selection=parts), noted:
                got = _attempt(mlp, run, x, otherwise)
            if not (activated and _close(mlp, got, expected)):
                raise _refusal(mlp, "it is not elementwise between its projections")
    of_whole, of_half = activated[-1].split([part.size(neurons) for part in parts])
    of_half = parts[1].compact(of_half, neurons, mlp.index.backend(device))[0]
    for activation in activations:
        mlp.index.activation = activation
        exact = exact_activations(mlp.index, seen.reshape(_BATCH * _TOKENS, -1))
        if _close(mlp, of_whole.view(_TOKENS, -1), exact[whole]) and _close(mlp, of_half, exact[others][:, half]):
            return
    if len(activations) == 1:
        found = getattr(activations[0], "__name__", activations[0])
        raise _refusal(
            mlp,
            f"its activation is not the {found} found beside the projections, or its gate is the second half of a "
            "stacked projection",
        )
    raise _refusal(mlp, "it has no activation under a usual name, and computes none of the common ones")


def _dtype(mlp: SparseMLP) -> torch.dtype:
    """Of the hidden states to test with: that of the weights or, if these are in 4 bits, which compute in any, that of
    biases and norms beside them, which PEFT's `prepare_model_for_kbit_training` casts to float32."""
    first = mlp.inputs[0]
    own = {id(value) for p in mlp.projections for value in (p.weight, *p.update.parameters())}
    others = (value.dtype for value in mlp.parent.parameters() if id(value) not in own and value.is_floating_point())
    return first.dtype if first.quantization is None else next(others, first.dtype)


Run = Callable[[Tensor], Tensor]


def _runnable(mlp: SparseMLP, x: Tensor) -> Run:
    """The function to test: the parent's forward, or those of the two modules that contain the projections."""
    holders = [path.rpartition(".")[0] for path in (next(iter(mlp.sources)), next(reversed(mlp.sources)))]
    run: Run = partial(_call, mlp.parent)
    try:
        run(x)
    except Exception:  # what it says is raised again below, unless there is another way to run
        if all(holders):
            into, out_of = map(mlp.parent.get_submodule, holders)
            run = lambda x: _call(out_of, _call(into, x), residual=x)  # noqa: E731
        _attempt(mlp, run, x, "it does not run by itself on random hidden states")
    return run


def _call(module: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """A module's output for hidden states x, given a residual where it takes one and None for other arguments."""
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    values = {name: (x if residual is None else residual) if name in _RESIDUALS else None for name in required}
    output = module(x, **values)
    return output if isinstance(output, Tensor) else output[0]


def _attempt(mlp: SparseMLP, run: Run, x: Tensor, otherwise: str) -> Tensor:
    try:
        return run(x)
    except Exception as error:
        raise _refusal(mlp, f"{otherwise} ({type(error).__name__}: {error})") from error


def _refusal(mlp: SparseMLP, why: str) -> UnsupportedModuleError:
    return UnsupportedModuleError(
        f"{mlp.name} ({type(mlp.parent).__name__}) cannot be made sparse: {why}. Leave it out with exclude_modules"
    )


def _close(mlp: SparseMLP, got: Tensor, expected: Tensor) -> bool:
    got, expected = got.float(), expected.float()
    eps = max(torch.finfo(projection.dtype).eps for projection in mlp.projections)
    if got.is_cuda and torch.get_float32_matmul_precision() != "highest":
        eps = max(eps, 2.0**-10)  # of TF32
    tolerance = max(1e-4, 4 * eps) * expected.abs().amax().item()
    return got.shape == expected.shape and (got - expected).abs().amax().item() <= tolerance
