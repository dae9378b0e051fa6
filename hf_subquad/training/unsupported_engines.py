"""Rejects, before training, the Trainer's engines that patched layers do not support."""

from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from ..errors import InactivePatchError, ParallelismError

# Of TRL: those whose loss looks at one pass of the model alone. All others compare its log-probabilities with those of
# a reference, or with its own of before.
_ONE_PASS = ("SFTConfig", "RewardConfig", "CPOConfig", "ORPOConfig", "PRMConfig", "DistillationConfig")
_LIGER_MLP_KERNELS = ("swiglu", "geglu")  # a model has one of them; were it the one left on, `check_active` would see


def check_engine(args: TrainingArguments) -> None:
    """
    Raises:
        InactivePatchError: Liger's kernels for MLPs would bypass the patch, or TRL would copy parameters one by one.
        ParallelismError: FSDP1, DeepSpeed, Megatron-LM or `torch.nn.DataParallel` would split or copy patched layers,
            or FSDP2 is combined with what is not supported.
    """
    liger = {kernel: on for kernel, on in (args.liger_kernel_config or {}).items() if kernel in _LIGER_MLP_KERNELS}
    if args.use_liger_kernel and (not liger or any(liger.values())):
        raise InactivePatchError(
            "use_liger_kernel=True rebinds the MLPs' forward and would bypass the patch: set it to False, or leave "
            'the MLPs out of it: liger_kernel_config={"swiglu": False, "geglu": False}'
        )
    if getattr(args, "sync_ref_model", False):
        raise InactivePatchError(
            "sync_ref_model=True mixes the model's parameters, one after the other, into those of the reference model; "
            "patched MLPs have different parameters, so their updates would be lost. Set sync_ref_model=False"
        )
    engine = AcceleratorState._shared_state.get("distributed_type")  # to construct one would set it anew
    if engine == DistributedType.FSDP or args.fsdp:
        _check_fsdp(args)
    if args.deepspeed:
        engine = DistributedType.DEEPSPEED
    if engine in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ParallelismError(
            f"{engine.value} splits weights or optimizer states over processes, but choosing neurons and "
            "folding need whole weights: train with FSDP version 2, or with plain data parallelism (DDP), as with "
            "accelerate launch --multi_gpu"
        )
    if args.n_gpu > 1:
        raise ParallelismError(
            f"the Trainer would copy the model to {args.n_gpu} GPUs in every step (torch.nn.DataParallel), and the "
            "copies would share one selection of neurons: start one process per GPU (accelerate launch, torchrun), or "
            "show one GPU only (CUDA_VISIBLE_DEVICES=0)"
        )


def uses_fsdp2() -> bool:
    """Whether accelerate shards the model with `fully_shard`."""
    state = AcceleratorState._shared_state
    plugin = state.get("fsdp_plugin")
    return state.get("distributed_type") == DistributedType.FSDP and getattr(plugin, "fsdp_version", 1) == 2


def _check_fsdp(args: TrainingArguments) -> None:
    plugin: Any = AcceleratorState._shared_state.get("fsdp_plugin")
    if plugin is None:
        raise ParallelismError(
            "fsdp is set, but accelerate shards nothing here: it does so with several processes on GPUs only. Leave "
            "fsdp out, and train with plain data parallelism (DDP)"
        )
    asked = {
        "fsdp_version=1": plugin.fsdp_version != 2,
        "cpu_ram_efficient_loading=True": plugin.cpu_ram_efficient_loading,
        "cpu_offload=True": type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy",
        "activation_checkpointing=True": plugin.activation_checkpointing,
        "torch_compile=True": args.torch_compile,
    }
    if any(asked.values()):
        raise ParallelismError(
            f"patched layers do not support {', '.join(name for name, on in asked.items() if on)} with FSDP: use "
            "version 2, load the model whole on every rank, and checkpoint activations with gradient_checkpointing"
        )


def compares_with_reference(args: TrainingArguments) -> bool:
    """Whether the loss compares the trained model's log-probabilities with others that are computed without gradients.

    Those come from a dense model. A sparse model would differ from it from the start, and training would reduce that
    difference instead of the intended loss.
    """
    of_trl = [kind.__name__ for kind in type(args).__mro__ if kind.__module__.startswith("trl.")]
    return bool(of_trl) and not set(of_trl) & set(_ONE_PASS)
