"""Do two processes under FSDP2 train as one would, each with half of the frozen weights, and save plain checkpoints?"""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, merge_fsdp_weights
from helpers import sharded
from helpers.models import opt, tokens
from helpers.processes import assert_same, two_processes
from helpers.training import arguments, patched_opt
from safetensors.torch import load_file

from hf_subquad import ParallelismError, SubquadCallback

# Rounding of a step's gradients: sums over the tokens of a micro-batch and the neurons of an MLP. 20 steps add up.
ROUNDING = sharded.STEPS * torch.finfo(torch.float32).eps * (18 * 52) ** 0.5


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of one launch of two processes that ran every scenario, and what each rank found."""
    folder = tmp_path_factory.mktemp("fsdp")
    return folder, two_processes("fsdp_worker.py", folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", sharded.SCENARIOS)
def test_two_processes_equal_one(launched: Any, name: str) -> None:
    """Over 20 steps in float32: losses, norms of gradients, all gradients of the last step, weights, selections."""
    two, one = launched[1][0][name], sharded.run(name)
    assert two["losses"] == pytest.approx(one["losses"], rel=ROUNDING)
    assert two["norms"] == pytest.approx(one["norms"], rel=ROUNDING)
    assert two["losses"][-1] < 0.9 * two["losses"][0]  # trained
    for kind in ("gradients", "weights", "factors"):
        assert two[kind].keys() == one[kind].keys()
        for place, value in one[kind].items():
            error = (two[kind][place] - value).norm() / value.norm().clamp_min(1e-3)
            assert error < 10 * ROUNDING, (kind, place, error)
    assert two["restarts"] == one["restarts"] and two["budgets"] == one["budgets"]
    assert one["skips padding"] and two["skips padding"]
    assert two["update norm"] == pytest.approx(one["update norm"], rel=10 * ROUNDING)


known_accelerate = pytest.mark.skipif(not sharded.KNOWN_ACCELERATE, reason="not tried with this version of accelerate")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*sharded.SCENARIOS, pytest.param("trainer", marks=known_accelerate)])
def test_ranks_end_alike(launched: Any, name: str) -> None:
    one, two = (rank[name] for rank in launched[1])
    assert_same(one, two)


@pytest.mark.slow
def test_a_rank_holds_half_of_the_frozen_weights(launched: Any) -> None:
    """And no copy of a whole one between forward and backward, or between steps."""
    for rank in launched[1]:
        found = rank["memory"]
        assert found["after"] <= 0.55 * found["before"]
        assert found.pop("whole before") >= 4
        assert not any(count for name, count in found.items() if name.startswith("whole")), found


@pytest.mark.slow
def test_weights_gathered_in_bfloat16_are_kept_in_float32(launched: Any) -> None:
    for rank in launched[1]:
        exact, rounded = (rank[f"torch.{name}"] for name in ("float32", "bfloat16"))
        assert exact["dtypes"] == rounded["dtypes"] == {"torch.float32"}
        assert rounded["losses"] == pytest.approx(exact["losses"], rel=4 * torch.finfo(torch.bfloat16).eps)
        assert rounded["losses"] != exact["losses"]


@pytest.mark.slow
def test_weights_that_are_loaded_take_effect(launched: Any) -> None:
    assert all(rank["loaded"] for rank in launched[1])


@pytest.mark.slow
@known_accelerate
@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_accelerate_saves_plain_weights_and_goes_on_from_them(launched: Any, kind: str, tmp_path: Path) -> None:
    folder, ranks = launched
    for rank in ranks:
        assert rank[kind]["again"] == pytest.approx(rank[kind]["straight"], rel=1e-4)
    saved = [ranks[0][kind]["plain"], load_file(folder / kind / "merged" / "model.safetensors")]
    if kind == "SHARDED_STATE_DICT":
        merge_fsdp_weights(str(folder / kind / "state" / "pytorch_model_fsdp_0"), str(tmp_path))
        saved.append(load_file(tmp_path / "model.safetensors"))
    else:
        saved.append(torch.load(folder / kind / "state" / "pytorch_model_fsdp.bin", weights_only=True))
    models = []
    for state in saved:
        plain = opt()
        missing, unexpected = plain.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied
        models.append(plain.eval()(tokens()).logits)
    assert torch.equal(models[0], models[1]) and torch.equal(models[0], models[2])
    assert not torch.equal(models[0], opt().eval()(tokens()).logits)


@pytest.mark.slow
@known_accelerate
def test_the_trainer_plans_before_it_shards_and_resumes(launched: Any) -> None:
    folder, ranks = launched
    for rank in ranks:
        found = rank["trainer"]
        assert max(found["split"]) <= 0.55
        assert found["again"] == pytest.approx(found["straight"], abs=1e-4) and len(found["again"]) == 5
        assert min(found["budgets"]) < 52  # by the first rank's plan
    plain = opt().from_pretrained(folder / "trainer" / "run" / "checkpoint-5")
    torch.testing.assert_close(plain.eval()(tokens()).logits, ranks[0]["trainer"]["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_needs_whole_weights_is_refused(launched: Any) -> None:
    for rank in launched[1]:
        for call in ("calibrate", "compensate", "unpatch_model"):
            assert "FSDP holds the weights in shards" in rank["refusals"][call], call
        assert "shard decoder layers or whole MLPs" in rank["refusals"]["single projections"]


@known_accelerate
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"fsdp_version": 1}, "fsdp_version=1"),
        ({"fsdp_version": 2, "cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading=True"),
        ({"fsdp_version": 2, "cpu_offload": True}, "cpu_offload=True"),
        ({"fsdp_version": 2, "activation_checkpointing": True}, "activation_checkpointing=True"),
    ],
)
def test_settings_of_accelerate_that_are_refused(
    settings: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is sharded."""
    args = arguments(tmp_path)  # which resets the state
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", DistributedType.FSDP)
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", FullyShardedDataParallelPlugin(**settings))
    with pytest.raises(ParallelismError, match=named):
        SubquadCallback().on_init_end(args, None, None, model=patched_opt())
