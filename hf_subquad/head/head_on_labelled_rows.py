"""One forward pass of a model in which the head sees only the labelled rows, and the loss only their labels."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ..weights.projection_with_update import compute_dtype
from .chunked_loss import chunked_cross_entropy

IGNORED = -100  # transformers' label of a position without loss

# How the labelled rows reach the loss. 'chunks': the model's loss function is replaced by one that includes the head.
# 'rows': the head gives logits of the labelled rows, and what the model does to them, and its loss function, follow.
# 'labels': the loss stands inside the model's forward, which is called with the labels of these rows.
Method = Literal["chunks", "rows", "labels"]


class NotHereError(Exception):
    """A call cannot run on labelled rows. Internal: the stock forward runs instead.

    It has a message if the reason is the model rather than this call.
    """


class ReadsLogitsError(NotHereError):
    """The model's forward computes on the logits after its loss, so no method has what it needs."""


def run_on_labelled_rows(
    model: PreTrainedModel,
    stock: Callable[..., Any],
    inputs: dict[str, Any],
    method: Method,
    megabytes: int,
    keep_logits: bool = False,
) -> Any:
    """The outputs of the stock forward; `logits` are None or, with `keep_logits`, those of the labelled rows
    [1, n, vocabulary].

    Raises:
        NotHereError: these inputs, or this model, need the stock forward.
    """
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or not _is_plain(inputs, labels, model):
        raise NotHereError
    call = _Call(model, labels, megabytes, method, keep_logits)
    if not call.targets.numel():  # the loss of no labels is what the stock forward makes of it
        raise NotHereError
    if method == "labels":
        inputs = {**_with_decoder_inputs(model, inputs, labels), "labels": call.targets}
    with call.in_place():
        try:
            outputs = stock(**inputs)
        except NotHereError as reason:
            if call.has_loss:
                raise ReadsLogitsError(str(reason)) from reason
            raise
    if not call.head_calls or (method != "labels" and not call.loss_calls):
        raise NotHereError("its forward does not call its head and its loss function")
    logits = outputs.logits if keep_logits else None
    if call.kept:
        logits = torch.cat(call.kept).unsqueeze(0)
    return dataclasses.replace(outputs, logits=logits)


def labelled_positions(labels: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """The positions of a batch that have a label, in order, and their labels: int64 [n] both.

    Args:
        labels: token ids or `IGNORED`; shape (batch, length), which positions count flattened.
        shifted: position t is scored against label t + 1, as in causal LMs; otherwise against label t.
    """
    if shifted:
        labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    flat = labels.reshape(-1)
    positions = (flat != IGNORED).nonzero().squeeze(-1)
    return positions, flat[positions]


class _Call:
    """Replaces head and loss function during one forward pass. Labelled rows are a batch of one."""

    def __init__(
        self, model: PreTrainedModel, labels: Tensor, megabytes: int, method: Method, keep_logits: bool
    ) -> None:
        self.model, self.labels, self.megabytes, self.method = model, labels, megabytes, method
        self.head: nn.Module = model.get_output_embeddings()
        self.head_forward = self.head.forward
        self.linear = type(self.head) is nn.Linear and "forward" not in vars(self.head)
        self.loss_function = model.loss_function
        shifted = method != "labels" and self.loss_function is ForCausalLMLoss
        self.positions, targets = labelled_positions(labels, shifted)
        self.targets = targets.unsqueeze(0)
        self.head_calls = self.loss_calls = 0
        self.has_loss = False
        self.labelled: Tensor | None = None  # hidden states, if the loss function is to include the head
        self.stand_in: _StandIn | None = None  # for the logits, between head and loss
        self.kept: list[Tensor] | None = [] if keep_logits else None  # logits of chunks

    @contextmanager
    def in_place(self) -> Iterator[None]:
        loss = {"chunks": self.loss_of_chunks, "rows": self.loss_of_rows, "labels": self.unexpected_loss}[self.method]
        with _attribute(self.head, "forward", self.gathered), _attribute(self.model, "_loss_function", loss):
            yield

    def gathered(self, hidden: Tensor) -> Tensor:
        self.head_calls += 1
        if self.head_calls > 1:
            raise NotHereError("its forward calls the head more than once")
        if hidden.shape[:-1] != self.labels.shape:
            raise NotHereError(
                f"the head got hidden states {tuple(hidden.shape)} for labels {tuple(self.labels.shape)}"
            )
        labelled = hidden.flatten(0, 1).index_select(0, self.positions.to(hidden.device)).unsqueeze(0)
        # Chunks compute gradients before the loss scale of float16 could keep the small ones from vanishing.
        if self.method != "chunks" or compute_dtype(hidden) == torch.float16:
            return cast("Tensor", self.head_forward(labelled))
        self.labelled, self.stand_in = labelled, labelled.detach().as_subclass(_StandIn)
        return self.stand_in

    def loss_of_rows(self, logits: Tensor, labels: Tensor, vocab_size: int, *args: Any, **kwargs: Any) -> Tensor:
        compact = self._compact_labels(logits, labels, kwargs)
        if self.loss_function is ForCausalLMLoss:
            kwargs["shift_labels"] = compact
        return self.loss_function(logits, compact, vocab_size, *args, **kwargs)

    def loss_of_chunks(
        self, logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        if self.labelled is None:
            return self.loss_of_rows(logits, labels, vocab_size, num_items_in_batch=num_items_in_batch, **kwargs)
        compact = self._compact_labels(logits, labels, kwargs)
        if logits is not self.stand_in:
            raise NotHereError("its forward changes the logits between head and loss")
        self.has_loss = True
        return chunked_cross_entropy(
            self.head_forward,
            [parameter for parameter in self.head.parameters() if parameter.requires_grad and torch.is_grad_enabled()],
            self.labelled[0],
            compact[0],
            len(compact[0]) if num_items_in_batch is None else num_items_in_batch,
            vocab_size,
            self.megabytes,
            cast("nn.Parameter", self.head.weight) if self.linear else None,
            self.kept,
        )

    def unexpected_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotHereError("its loss function is not one of transformers' for language models")

    def _compact_labels(self, logits: Tensor, labels: Tensor, kwargs: dict[str, Any]) -> Tensor:
        self.loss_calls += 1
        if logits.shape[:-1] != self.targets.shape or labels is not self.labels:
            raise NotHereError("its forward changes logits or labels between head and loss")
        if kwargs.get("shift_labels") is not None or kwargs.get("ignore_index", IGNORED) != IGNORED:
            raise NotHereError("its loss is called with shift_labels or ignore_index")
        return self.targets.to(logits.device)


class _StandIn(Tensor):
    """What a forward gets instead of logits that its loss function will compute: it may pass it on, and no more."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", None)
        if name not in ("__get__", *_LOOKED_AT, *_PASSED_ON):
            raise NotHereError("its forward computes on the logits beside its loss function")
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **(kwargs or {}))
        if not isinstance(found, Tensor) or found is args[0]:
            return found
        if name not in _PASSED_ON:  # as .T and .data are, which are attributes
            raise NotHereError("its forward computes on the logits beside its loss function")
        return found.as_subclass(_StandIn)


_LOOKED_AT = ("size", "stride", "dim", "ndimension", "numel", "nelement", "__len__", "__hash__", "is_contiguous",
              "is_floating_point", "get_device")  # fmt: skip
_PASSED_ON = ("contiguous", "float", "to")  # the same values; accelerate converts outputs to float32


def _is_plain(inputs: dict[str, Any], labels: Tensor, model: PreTrainedModel) -> bool:
    """Whether a call asks for the loss of token ids, and for nothing that needs the logits of all positions.

    With a cache it is not plain: the stock forward may have to run after all, and would fill the cache twice.
    """
    if inputs.get("past_key_values") is not None or inputs.get("use_cache"):
        return False
    if labels.dim() != 2 or labels.is_floating_point() or {"shift_labels", "ignore_index"} & set(inputs):
        return False
    if inputs.get("return_dict", getattr(model.config, "return_dict", True)) is False:
        return False
    keep = inputs.get("logits_to_keep")
    return keep is None or (isinstance(keep, int) and keep == 0)


def _with_decoder_inputs(model: PreTrainedModel, inputs: dict[str, Any], labels: Tensor) -> dict[str, Any]:
    """Decoder inputs made from all labels, because the forward only gets some of the labels."""
    if not model.config.is_encoder_decoder:
        return inputs
    if inputs.get("decoder_input_ids") is not None or inputs.get("decoder_inputs_embeds") is not None:
        return inputs
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        return {**inputs, "decoder_input_ids": prepare(labels=labels)}
    # Others shift the labels by one position inside their forward; the check has compared the loss.
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    shifted = torch.cat([start, labels[:, :-1]], dim=1)
    return {**inputs, "decoder_input_ids": shifted.masked_fill(shifted == IGNORED, model.config.pad_token_id)}


@contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Give an instance an attribute for a while; afterwards it has its own one again, or none."""
    before = module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before
