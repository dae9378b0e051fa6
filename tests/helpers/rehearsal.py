"""A sparse MLP, forward and backward, on a GPU that is not there: all is real but the device. First all tokens are in
tiles, then half of them, which are context; the others compute all neurons.

    python -m helpers.rehearsal 90 bfloat16 gated 256 1024 16 64

Every kernel goes through Triton's launch path, is specialised on its arguments and compiled to machine code for the
compute capability that is named, and is not run: results are zeros. Prints the kernels that were launched, as JSON, in
both passes and in the first: for each of their versions how often it was launched, its shared memory in bytes, and how
often its PTX has wgmma, any tensor-core instruction, and asynchronous copies of 16 bytes or fewer.
"""

import copy
import inspect
import json
import os
import re
import sys
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver

from helpers.mlps import patched
from hf_subquad.layers.batch_hook import unwatch_batches
from hf_subquad.layers.budget import Budget
from hf_subquad.layers.classify_tokens import BatchClasses, TokenClasses
from hf_subquad.ops import mlp_products
from hf_subquad.ops.backends import triton_backend  # now, for kernels are defined to be interpreted or not

SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448}  # bytes that one program may use
MULTIPROCESSORS = 132
TOKENS, TILE = 4096, 128


class Utils:
    def __init__(self, gpu: "AbsentGPU") -> None:
        self._gpu = gpu

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self._gpu.capability], "multiprocessor_count": MULTIPROCESSORS}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        assert binary
        found = 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads
        return found if "n_max_threads" in inspect.getsource(CompiledKernel._init_handles) else found[:4]


class AbsentGPU:
    """What Triton asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = Utils(self)
        self.launched: dict[str, list[dict[str, int]]] = {}
        self._ptx: dict[str, str] = {}
        self._keep_ptx()

    def _keep_ptx(self) -> None:
        """Of every kernel, for a launcher is not told."""
        init = CompiledKernel.__init__

        def keeping(kernel: CompiledKernel, *args: Any, **kwargs: Any) -> None:
            init(kernel, *args, **kwargs)
            self._ptx[kernel.metadata.hash] = kernel.asm["ptx"]

        CompiledKernel.__init__ = keeping

    def launcher_cls(self, source: Any, compiled: Any) -> Any:
        version = {"launches": 0, "shared": compiled.shared, **counted(self._ptx[compiled.hash])}
        self.launched.setdefault(compiled.name, []).append(version)

        def launch(*grid_and_arguments: Any) -> None:
            version["launches"] += 1

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def counted(ptx: str) -> dict[str, int]:
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], (\w+)", ptx)
    wide = sum(int(size, 0) == 16 for size in copies)
    wgmma = ptx.count("wgmma.mma_async")
    tensor = wgmma + ptx.count("mma.sync")
    return {"wgmma": wgmma, "tensor": tensor, "wide_copies": wide, "narrow_copies": len(copies) - wide}


def rehearse(
    capability: int, dtype: torch.dtype, kind: Any, d: int, m: int, rank: int, sketch_rank: int
) -> list[dict[str, list[dict[str, int]]]]:
    gpu = AbsentGPU(capability)
    driver.set_active(gpu)
    assert os.environ.get("TRITON_INTERPRET") != "1", "kernels are interpreted, not compiled"
    triton_backend.triton_selection._multiprocessors = lambda device: MULTIPROCESSORS
    os.environ["TRITON_INTERPRET"] = "1"  # only now: tensors on the processor are given to the kernels
    mlp_products._all_pass = lambda gradient, share: share >= 1  # as on a GPU
    Tensor.new_empty, torch.empty, torch.empty_like = Tensor.new_zeros, torch.zeros, torch.zeros_like
    settings = {"active": m // 4, "tile_size": TILE, "rank": rank, "sketch_rank": sketch_rank}
    module, mlp, _ = patched(kind, d, m, dtype=dtype, **settings)
    mlp.index.backend_name = "triton"  # now: results of zeros fail the self-test
    x = torch.randn(TOKENS, d, dtype=dtype).requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    first = copy.deepcopy(gpu.launched)
    classes = TokenClasses((1, TOKENS), *torch.arange(TOKENS).chunk(2))
    unwatch_batches(module)  # which is called without labels
    mlp.runtime.passes.begin(BatchClasses({"only": classes}))
    with mlp.using(Budget(context=m // 4)):
        module(x).sum().backward()
    return [gpu.launched, first]


if __name__ == "__main__":
    capability, dtype, kind, *sizes = sys.argv[1:]
    print(json.dumps(rehearse(int(capability), getattr(torch, dtype), kind, *map(int, sizes))))
