"""Do two processes train as one would, agree on all they must, and refuse what cannot work?"""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from distributed_worker import work
from helpers.distributed import SCENARIOS, found, loads_as_the_trainer_asks, run_scenario
from helpers.models import assert_same as assert_unchanged
from helpers.models import fill_updates, opt, snapshot, tokens
from helpers.processes import assert_same, two_forks
from helpers.training import TRAIN, Texts, arguments, factors, patched_opt
from packaging.version import Version
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from hf_subquad import ParallelismError, SubquadCallback, UnsupportedModuleError, patch_model, sparse_mlps, sync_model


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of two processes that ran every scenario, and what each rank found."""
    folder = tmp_path_factory.mktemp("launched")
    return folder, two_forks(work, folder)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="older Trainers may accumulate otherwise, with any model (5.2: gradients half as large)",
)
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_equal_one_that_accumulates(launched: Any, tmp_path: Path, name: str) -> None:
    """With the same micro-batches, tiles are the same; what differs is the order of a few sums in float32."""
    two, one = launched[1][0][name], found(run_scenario(name, tmp_path, processes=1))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["gradients"] == pytest.approx(one["gradients"], rel=1e-4)
    assert two["budgets"] == one["budgets"] and two["restarts"] == one["restarts"]
    assert [2 * calls for calls in two["calls"]] == one["calls"]
    for kind in ("factors", "weights"):
        for place, value in one[kind].items():
            torch.testing.assert_close(
                two[kind][place], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=place: f"{n}: {m}"
            )
    assert (
        max((two["weights"][n] - p.detach()).abs().max() for n, p in patched_opt().named_parameters()) > 0.01
    )  # trained


can_resume = pytest.mark.skipif(not loads_as_the_trainer_asks(), reason="this torch cannot load to cpu:0")


@pytest.mark.parametrize("name", [*SCENARIOS, "one plan", pytest.param("resumed", marks=can_resume), "dropping layers"])
def test_ranks_end_alike(launched: Any, name: str) -> None:
    """Plans, budgets, corrections, sketches, weights, factors and folds; how often an MLP was called is its own."""
    one, two = ({k: v for k, v in rank[name].items() if k != "calls"} for rank in launched[1])
    assert_same(one, two)


def test_folds_count_optimizer_steps(launched: Any) -> None:
    """Four of them, also with two micro-batches each."""
    for name in ("folds and dense steps", "accumulation"):
        assert set(launched[1][0][name]["restarts"]) == {2}
    assert launched[1][0]["accumulation"]["calls"] == [8, 8]
    assert launched[1][0]["folds and dense steps"]["calls"] == [2, 2]


def test_the_first_rank_plans_and_fits_for_all(launched: Any) -> None:
    folder, (one, _) = launched
    layers = one["one plan"]["plan"]["layers"]
    assert any(layer["sparse_ms"] < layer["dense_ms"] for layer in layers)
    assert any(one["one plan"]["corrections"])
    with_plan = sum(result["plan"] is not None for result in one.values() if "plan" in result)
    assert (folder / "printed").read_text().count("Planning took") == with_plan == 4  # one rank prints it
    assert (folder / "one plan" / "subquad_plan.json").is_file()


@can_resume
def test_resumed_equals_uninterrupted(launched: Any) -> None:
    found_again = launched[1][0]["resumed"]
    assert len(found_again["losses"]) == 5
    assert found_again["losses"] == pytest.approx(found_again["straight"], abs=1e-4)


def test_one_rank_without_tiles_to_audit_does_not_hang_the_other(launched: Any) -> None:
    one, two = (rank["dropping layers"] for rank in launched[1])
    assert one["calls"] != two["calls"]  # they did drop other layers
    assert one["audited"] == two["audited"]


def test_fsdp_that_shards_nothing_is_refused_before_training(launched: Any) -> None:
    for rank in launched[1]:
        assert "accelerate shards nothing here" in rank["fsdp"] and "DDP" in rank["fsdp"]
        assert "layers.1.fc1 is split over processes" in rank["sharded"]


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_engines_that_split_models_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """As accelerate's config or launcher chooses them, at whichever time the callback comes."""
    model = patched_opt()
    late = Trainer(model=model, args=arguments(tmp_path), train_dataset=Texts())
    late.add_callback(SubquadCallback())
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", kind)
    with pytest.raises(ParallelismError, match=rf"{kind.value} splits weights.*\(DDP\)"):
        SubquadCallback().on_init_end(late.args, late.state, late.control, model=model)
    with pytest.raises(ParallelismError):
        late.callback_handler.on_train_begin(late.args, late.state, late.control)
    assert not any(mlp.calls for mlp in sparse_mlps(model))


def test_weights_split_by_deepspeed_are_refused() -> None:
    model = opt()
    model.get_parameter("model.decoder.layers.1.fc1.weight").ds_id = 3
    before = snapshot(model)
    with pytest.raises(UnsupportedModuleError, match="ZeRO-3"):
        patch_model(model, TRAIN)
    assert_unchanged(before, snapshot(model))


def test_data_parallel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the Trainer's settings before training, and by the layers themselves in any loop."""
    args = arguments(tmp_path)
    args._n_gpu = 2
    model = patched_opt()
    with pytest.raises(ParallelismError, match="CUDA_VISIBLE_DEVICES"):
        Trainer(model=model, args=args, train_dataset=Texts(), callbacks=[SubquadCallback()])
    with pytest.raises(ParallelismError, match="one process per GPU"):
        replicate = sys.modules["torch.nn.parallel.replicate"]
        monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", lambda values, *_, **__: [list(values)])
        replicate.replicate(model, [torch.device("cuda", 0)])


@pytest.fixture
def lone_process() -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrapped", [False, True])
def test_state_through_pytorchs_distributed_checkpoint(lone_process: None, wrapped: bool) -> None:
    """What it gets is plain; setting it restores the updates that it was made with, and the optimizer's moments."""
    model = patched_opt()
    fill_updates(model)
    whole = DistributedDataParallel(model) if wrapped else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    state, before = get_model_state_dict(whole), factors(model)
    assert set(state) == set(opt().state_dict())
    state = {name: value.clone() for name, value in state.items()}
    fill_updates(model, seed=7)
    assert not set_model_state_dict(model, state).missing_keys
    assert all(torch.equal(value, before[name]) for name, value in factors(model).items())
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    saved = copy.deepcopy(get_optimizer_state_dict(whole, optimizer))
    optimizer.step()
    set_optimizer_state_dict(whole, optimizer, saved)
    assert all(map(torch.equal, moments, (state["exp_avg"] for state in optimizer.state.values())))


def test_a_fold_resets_moments_in_a_sharded_optimizer(lone_process: None) -> None:
    model = patched_opt(fold_steps=2)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = ZeroRedundancyOptimizer(trained, torch.optim.AdamW, lr=1e-2)
    optimizer.optimizer = "AdamW"  # as some wrappers name theirs
    updates = [p for name, p in model.named_parameters() if ".update." in name]
    sync_model(model, 0)
    for step in (1, 2):
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        sync_model(model, step, optimizer)
        assert all((factor in optimizer.optim.state) == (step == 1) for factor in updates)
