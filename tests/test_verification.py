"""Kernels that compute something else than PyTorch are found before they are used."""

import logging as standard_logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers.utils import logging

from hf_subquad import BackendError
from hf_subquad.ops import backends as choice
from hf_subquad.ops.backends import backend_for
from hf_subquad.ops.backends.torch_backend import TorchBackend
from hf_subquad.ops.backends.verification import mismatch

CPU = torch.device("cpu")


def test_kernels_compute_what_pytorch_does() -> None:
    pytest.importorskip("triton", minversion="3.3")
    from hf_subquad.ops.backends.triton_backend import TritonBackend

    assert mismatch(TritonBackend(), CPU) is None


@pytest.mark.gpu
def test_kernels_compute_what_pytorch_does_on_a_gpu() -> None:
    from hf_subquad.ops.backends.triton_backend import TritonBackend

    device = torch.device("cuda", 0)
    assert mismatch(TorchBackend(), device) is None
    held = torch.cuda.memory_allocated()
    assert mismatch(TritonBackend(), device) is None
    assert torch.cuda.memory_allocated() == held


def broken(operation: str, change: Callable[[Any, tuple[Any, ...]], Any]) -> TorchBackend:
    """Computes right but for one operation, whose result and arguments are given to `change`."""
    backend = TorchBackend()
    right = getattr(backend, operation)
    setattr(backend, operation, lambda *args: change(right(*args), args))
    return backend


def larger(result: Any, args: Any = None) -> Any:
    return 1.1 * result if isinstance(result, Tensor) else type(result)(larger(part) for part in result)


@pytest.mark.parametrize("operation", ["gathered_up", "gathered_down", "update_gradients", "tile_scores"])
def test_results_too_large(operation: str) -> None:
    found = mismatch(broken(operation, larger), CPU)
    assert found and found.startswith(operation) and "relative error of 0.1," in found


@pytest.mark.parametrize("operation", ["gathered_up", "gathered_down"])
def test_two_matrices(operation: str) -> None:
    found = mismatch(broken(operation, lambda y, args: larger(y) if len(args[-1]) == 2 else y), CPU)
    assert found and found.startswith(f"{operation} with two matrices")


def test_scores_of_plain_mlps() -> None:
    found = mismatch(broken("tile_scores", lambda y, args: larger(y) if len(args[1].inputs) == 1 else y), CPU)
    assert found and found.startswith("tile_scores of a plain MLP")


@pytest.mark.parametrize("result", [0, 1])
def test_second_results_and_nan(result: int) -> None:
    def change(results: Any, args: Any) -> Any:
        results[result].view(-1)[-1] = float("nan")
        return results

    found = mismatch(broken("update_gradients", change), CPU)
    assert found and "relative error of nan" in found


@pytest.mark.parametrize("part", ["tile", "spare"])
def test_parts_of_results(part: str) -> None:
    """The output of one slot."""

    def change(results: Any, args: Any) -> Any:
        tiles = args[1]
        place = int((tiles.spare if part == "spare" else tiles.position)[0])
        args[-1][0][place // tiles.shape[1], place % tiles.shape[1]] *= -1
        return results

    assert "gathered_up" in (mismatch(broken("gathered_up", change), CPU) or "")


def test_other_shapes() -> None:
    found = mismatch(broken("update_gradients", lambda y, args: (y[0][1:], y[1])), CPU)
    assert found == "update_gradients gives other shapes"


@pytest.mark.parametrize(
    "operation", ["gathered_up", "gathered_down", "update_gradients", "tile_scores", "top_neurons", "bisect"]
)
def test_exceptions(operation: str) -> None:
    def fail(result: Any, args: Any) -> Any:
        if args[0] is not None and (args[0][0] if isinstance(args[0], list) else args[0]).dtype is torch.float32:
            raise RuntimeError("no such instruction")

    found = mismatch(broken(operation, fail), CPU)
    assert found and found.startswith(operation) and found.endswith("RuntimeError: no such instruction")


def test_no_memory_is_no_mismatch() -> None:
    def fail(result: Any, args: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("full")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        mismatch(broken("bisect", fail), CPU)


def test_one_wrong_neuron() -> None:
    def change(neurons: Tensor, args: Any) -> Tensor:
        scores, k = args
        row = scores[2].argsort(descending=True)
        neurons[2] = torch.cat([row[: k - 1], row[k : k + 1]]).sort().values
        return neurons

    found = mismatch(broken("top_neurons", change), CPU)
    assert found == "top_neurons misses 1 of the 256 neurons with the largest scores"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y: torch.randperm(y.numel(), generator=torch.Generator().manual_seed(1)).view_as(y), "times as much"),
        (lambda y: y.clamp_min(1), "every entry once"),
        (lambda y: y + 1, "every entry once"),
        (lambda y: y.flip(1), None),
    ],
    ids=["random", "twice", "out-of-range", "another-order"],
)
def test_tiles(change: Callable[[Tensor], Tensor], said: str | None) -> None:
    found = mismatch(broken("bisect", lambda y, args: change(y)), CPU)
    assert found is None if said is None else found and found.startswith("bisect") and said in found


def test_tiles_of_many_tokens() -> None:
    found = mismatch(broken("bisect", lambda y, args: y.t().reshape(y.shape) if len(args[0]) > 250 else y), CPU)
    assert found and found.startswith("bisect of 1200 tokens makes tiles")


def test_the_caller_notices_nothing() -> None:
    """In none of the modes that it may be in; and these do not change what is found."""
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert mismatch(TorchBackend(), CPU) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert mismatch(TorchBackend(), CPU) is None
        assert torch.is_autocast_enabled("cpu")
    with FakeTensorMode():
        assert mismatch(TorchBackend(), CPU) is None
        assert mismatch(broken("gathered_up", larger), CPU)
    with torch.device("meta"):
        assert mismatch(TorchBackend(), CPU) is None
    torch.set_default_dtype(torch.float64)
    try:
        assert mismatch(TorchBackend(), CPU) is None
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


# What follows from it


class Tried:
    """In place of `mismatch`: finds what it is told to, and counts."""

    def __init__(self) -> None:
        self.found: str | None = None
        self.devices: list[str] = []
        self.capturing = False

    def __call__(self, backend: Any, device: torch.device) -> str | None:
        self.devices.append(str(device))
        return self.found


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tried]:
    """With CUDA devices that there seem to be."""
    found = Tried()
    monkeypatch.setattr(choice, "mismatch", found)
    monkeypatch.setattr(choice, "_verified", {})
    monkeypatch.setattr(choice, "_triton_installed", lambda: True)
    monkeypatch.setattr(choice, "_has_tensor_cores", lambda device: True)
    monkeypatch.setattr(choice, "_triton", lambda: "triton")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    choice.logger.warning_once.__func__.cache_clear()
    yield found
    choice.logger.warning_once.__func__.cache_clear()


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Messages of the library's logger."""
    seen: list[str] = []
    handler = standard_logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.get_logger(choice.__name__)
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)


def of(name: Any, device: str = "cuda:0") -> Any:
    return backend_for(name, torch.device(device))


def test_once_per_device(tried: Tried, warnings: list[str]) -> None:
    assert [of(name) for name in ("auto", "triton", "auto")] == ["triton"] * 3
    assert of("auto", "cuda:1") == "triton"
    assert isinstance(of("torch", "cuda:2"), TorchBackend) and isinstance(of("triton", "cpu"), TorchBackend)
    assert tried.devices == ["cuda:0", "cuda:1"] and not warnings


def test_auto_falls_back_and_warns_once(tried: Tried, warnings: list[str]) -> None:
    tried.found = "gathered_up with one matrix has a relative error of 0.1, where 0.03 is allowed"
    assert all(isinstance(of("auto"), TorchBackend) for _ in range(3))
    assert tried.devices == ["cuda:0"] and len(warnings) == 1
    assert tried.found in warnings[0] and "cuda:0" in warnings[0] and "hf-subquad env" in warnings[0]
    of("auto", "cuda:1")
    assert len(warnings) == 2


def test_triton_is_refused(tried: Tried, warnings: list[str]) -> None:
    tried.found = "bisect failed with RuntimeError: no such instruction"
    for _ in range(2):
        with pytest.raises(BackendError, match=r"no such instruction.*hf-subquad env"):
            of("triton")
    assert tried.devices == ["cuda:0"] and not warnings
    assert isinstance(of("auto"), TorchBackend) and len(warnings) == 1


def test_not_while_capturing(tried: Tried) -> None:
    tried.found, tried.capturing = "wrong", True
    assert of("auto") == "triton" and not tried.devices
    tried.capturing = False
    assert isinstance(of("auto"), TorchBackend)
    tried.capturing = True
    assert isinstance(of("auto"), TorchBackend) and tried.devices == ["cuda:0"]


def test_not_in_the_interpreter(tried: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert of("auto") == of("triton", "cpu") == "triton"
    assert not tried.devices
