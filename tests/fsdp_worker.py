"""One of two processes that train under FSDP2 together: started by torchrun, writes what each scenario ended with."""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from helpers import sharded
from helpers.models import llama, opt
from helpers.planning import set_times, trained_head
from helpers.training import TRAIN, StopAt, Texts, arguments, losses, patched_opt, steps_through_accelerate
from pytest import MonkeyPatch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import Trainer

from hf_subquad import (
    ParallelismError,
    SubquadCallback,
    SubquadConfig,
    calibrate,
    compensate,
    load_sidecar,
    patch_model,
    save_merged,
    save_sidecar,
    sparse_mlps,
    sync_model,
    unpatch_model,
)
from hf_subquad.weights.shards import gathered

torch.set_num_threads(1)
torch._C._get_accelerator = lambda: torch.device("cpu")  # where accelerate shards, also on a machine with a GPU
RANK = int(os.environ["RANK"])
PLANNED = SubquadConfig(**{**TRAIN.to_dict(), "active": None, "tolerance": 1e-5, "fold_steps": 2})


def plugin(**settings: Any) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False, **settings
    )


def as_on_gpus(fsdp: FullyShardedDataParallelPlugin) -> None:
    """accelerate shards on GPUs only: set its state as it would there."""
    AcceleratorState._shared_state["fsdp_plugin"] = fsdp
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP


def fresh_accelerate() -> None:
    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)


def prepared(**settings: Any) -> tuple[Accelerator, nn.Module, torch.optim.Optimizer]:
    fresh_accelerate()
    accelerator = Accelerator(cpu=True)
    as_on_gpus(plugin(**settings))
    model = patched_opt(fold_steps=2, refresh_steps=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer


def train(accelerator: Accelerator, model: nn.Module, optimizer: Any, first: int, last: int) -> list[float]:
    """Losses of the steps from first to last."""
    batches = {step: sharded.micro_batch(step, RANK) for step in range(first, last + 1)}
    return steps_through_accelerate(accelerator, model, optimizer, batches)


def with_accelerate(folder: Path, kind: str) -> dict[str, Any]:
    """Saved after three steps and gone on with, from its own state and from the saved one."""
    accelerator, model, optimizer = prepared(state_dict_type=kind)
    accelerator.register_save_state_pre_hook(lambda models, weights, place: save_sidecar(models[0], place, step=3))
    sync_model(model, 0)
    train(accelerator, model, optimizer, 1, 3)
    accelerator.save_state(str(folder / "state"))
    plain = accelerator.get_state_dict(model)
    save_merged(model, folder / "merged")
    straight = train(accelerator, model, optimizer, 4, 6)

    accelerator, model, optimizer = prepared(state_dict_type=kind)
    accelerator.load_state(str(folder / "state"))
    sync_model(model, load_sidecar(model, folder / "state"))
    return {"straight": straight, "again": train(accelerator, model, optimizer, 4, 6), "plain": plain}


class ShardingTrainer(Trainer):
    """Shards on the CPU, too."""

    def create_accelerator_and_postprocess(self) -> None:
        fresh_accelerate()
        super().create_accelerator_and_postprocess()
        as_on_gpus(FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args))
        self.is_fsdp_enabled = True


def with_trainer(folder: Path) -> dict[str, Any]:
    """Planned, stopped after three steps and gone on with, and the same without a stop."""

    def run(place: str, *callbacks: Any, **settings: Any) -> Trainer:
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, **settings}
        return ShardingTrainer(
            model=patch_model(opt(), PLANNED), train_dataset=Texts(), callbacks=[SubquadCallback(), *callbacks],
            args=arguments(folder / place, fsdp=True, fsdp_config={"version": 2}, **settings),
        )  # fmt: skip

    with MonkeyPatch.context() as patch:
        set_times(patch, overhead=(0.2, 3.0)[RANK])  # by itself, the second rank would plan all dense
        trained_head(patch)
        straight = run("straight", save_strategy="no")
        straight.train()
        run("run", StopAt(3)).train()
        again = run("run")
        again.train(resume_from_checkpoint=True)
    return {
        "straight": losses(straight), "again": losses(again), "split": shares(straight.model),
        **sharded.end(again.model),
    }  # fmt: skip


def shares(model: nn.Module) -> list[float]:
    """Share of each base weight that this process holds."""
    weights = [p.weight for mlp in sparse_mlps(model) for p in mlp.projections]
    return [sharded.whole_or_part(weight).numel() / weight.numel() for weight in weights]


def memory(mesh: Any) -> dict[str, Any]:
    """What a process holds of the base weights: before and after sharding, and between passes."""
    model = patch_model(opt(ffn_dim=4000), SubquadConfig(**{**TRAIN.to_dict(), "active": 0.25, "sketch_rank": 8}))
    for name, parameter in model.named_parameters():  # gradients of other weights are not what is looked for
        parameter.requires_grad_(".update." in name)
    size = sparse_mlps(model)[0].output.weight.nbytes
    found = {"before": sharded.frozen_bytes(model), "whole before": sharded.large_tensors(size)}
    sharded.shard(model, mesh)
    sync_model(model, 0)
    found |= {"after": sharded.frozen_bytes(model), "whole after": sharded.large_tensors(size)}
    loss, found["whole saved"] = sharded.forward(model, sharded.micro_batch(1, RANK), size)
    found["whole between passes"] = sharded.large_tensors(size)
    loss.backward()
    sync_model(model, 1)
    found["whole between steps"] = sharded.large_tensors(size)
    return found


def gathered_in(dtype: torch.dtype, mesh: Any) -> dict[str, Any]:
    """Losses of a few steps with weights gathered in a dtype, and the dtypes of what is kept."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    model = sharded.shard(patched_opt(fold_steps=2, refresh_steps=3), mesh, mp_policy=policy)
    sync_model(model, 0)
    found = []
    for step in range(1, 6):
        loss = model(**sharded.micro_batch(step, RANK)).loss
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.1)
        model.zero_grad()
        sync_model(model, step)
        found.append(loss.item())
    return {"losses": found, "dtypes": {str(p.dtype) for p in model.parameters()}}


def refused(call: Any) -> str:
    try:
        call()
    except ParallelismError as error:
        return str(error)
    return "not refused"


def refusals(mesh: Any) -> dict[str, str]:
    batches = [sharded.micro_batch(0, 0)] * 2
    model = sharded.shard(patched_opt(), mesh)
    single = patch_model(llama(), TRAIN)
    for projection in sparse_mlps(single)[0].projections:
        fully_shard(projection, mesh=mesh)
    fully_shard(single, mesh=mesh)
    return {
        "calibrate": refused(lambda: calibrate(model, batches)),
        "unpatch_model": refused(lambda: unpatch_model(model)),
        "compensate": refused(lambda: compensate(model, batches)),
        "single projections": refused(lambda: single(**batches[0])),
    }


def loaded(mesh: Any) -> bool:
    """Whether shards of other weights that are loaded take effect: the update restarts, the index is built anew."""
    model, other = (sharded.shard(patched_opt(), mesh) for _ in range(2))
    sync_model(model, 0)
    with gathered([p for mlp in sparse_mlps(other) for p in mlp.projections]), torch.no_grad():
        for mlp in sparse_mlps(other):
            for projection in mlp.projections:
                projection.update.U.fill_(0.1)
                projection.update.V.fill_(0.2)
    model.load_state_dict(other.state_dict())
    ends = [sharded.end(one) for one in (model, other) if sync_model(one, 1)]
    same = all(torch.allclose(ends[0]["weights"][n], value, atol=1e-6) for n, value in ends[1]["weights"].items())
    return same and not torch.equal(ends[0]["codes"][0], ends[1]["codes"][0])


if __name__ == "__main__":
    out = Path(sys.argv[1])
    PartialState(cpu=True)
    mesh = init_device_mesh("cpu", (sharded.RANKS,))
    results: dict[str, Any] = {name: sharded.run(name, mesh) for name in sharded.SCENARIOS}
    results["memory"] = memory(mesh)
    for dtype in (torch.float32, torch.bfloat16):
        results[str(dtype)] = gathered_in(dtype, mesh)
    results["loaded"] = loaded(mesh)
    if sharded.KNOWN_ACCELERATE:
        for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
            results[kind] = with_accelerate(out / kind, kind)
        results["trainer"] = with_trainer(out / "trainer")
        fresh_accelerate()
    results["refusals"] = refusals(mesh)
    torch.save(results, out / f"rank{RANK}.pt")
