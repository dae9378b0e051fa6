"""Rejects, before training, the Trainer's engines that patched layers do not support."""

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
        ParallelismError: FSDP, DeepSpeed, Megatron-LM or `torch.nn.DataParallel` would split or copy patched layers.
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
    asked = DistributedType.FSDP if args.fsdp else DistributedType.DEEPSPEED if args.deepspeed else None
    splitting = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM} & {engine, asked}
    if splitting:
        raise ParallelismError(
            f"{splitting.pop().value} splits weights or optimizer states over processes, but choosing neurons and "
            "folding need whole weights: train with plain data parallelism (DDP), as with accelerate launch --multi_gpu"
        )
    if args.n_gpu > 1:
        raise ParallelismError(
            f"the Trainer would copy the model to {args.n_gpu} GPUs in every step (torch.nn.DataParallel), and the "
            "copies would share one selection of neurons: start one process per GPU (accelerate launch, torchrun), or "
            "show one GPU only (CUDA_VISIBLE_DEVICES=0)"
        )


def compares_with_reference(args: TrainingArguments) -> bool:
    """Whether the loss compares the trained model's log-probabilities with others that are computed without gradients.

    Those come from a dense model. A sparse model would differ from it from the start, and training would reduce that
    difference instead of the intended loss.
    """
    of_trl = [kind.__name__ for kind in type(args).__mro__ if kind.__module__.startswith("trl.")]
    return bool(of_trl) and not set(of_trl) & set(_ONE_PASS)
