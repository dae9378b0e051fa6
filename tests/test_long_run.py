"""Does a long training stay as small and as fast as it began?"""

import gc
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import opt
from helpers.planning import hand_plan
from helpers.training import TRAIN, Watch, losses, trainer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_subquad import SubquadConfig, apply_plan, patch_model, sparse_mlps
from hf_subquad.planning.measured_token_class import neuron_counts

ROOT = Path(__file__).parents[1]


def watched(model: nn.Module, config: SubquadConfig, active: list[int], error: float) -> nn.Module:
    """Patched, with a plan that budgets are held against as training goes on."""
    plan = hand_plan(patch_model(model, config), active, error=error)
    apply_plan(model, plan)
    return model


def tensors() -> tuple[int, int]:
    """Number and bytes of the tensors that are alive."""
    gc.collect()
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return len(alive), sum(tensor.untyped_storage().nbytes() for tensor in alive)


@pytest.mark.parametrize(
    "autocast", [pytest.param(False, marks=pytest.mark.slow, id="fp32"), pytest.param(True, id="bf16")]
)
def test_nothing_piles_up(tmp_path: Path, autocast: bool) -> None:
    """Neither tensors nor other objects, over folds, refreshes and audits."""
    config = SubquadConfig(**{**TRAIN.to_dict(), "active": None, "fold_steps": 5, "refresh_steps": 4})
    model = watched(opt(), config, [24, 16], error=1.2)
    first, last = 45, 125  # both as far in an epoch of 8 steps and from a fold
    seen: dict[int, tuple[int, int, int]] = {}

    def look(model: nn.Module, step: int, **_: Any) -> None:
        if step in (first, last):
            seen[step] = (*tensors(), len(gc.get_objects()))

    trainer(model, tmp_path, [Watch(look)], max_steps=last, logging_steps=1000, bf16=autocast).train()
    assert seen[last][:2] == seen[first][:2]
    assert seen[last][2] <= seen[first][2] + 20
    assert not any(mlp.dense for mlp in sparse_mlps(model))
    assert all(p.update.restarts == last // 5 for mlp in sparse_mlps(model) for p in mlp.projections)


class Rows(torch.utils.data.Dataset):
    """This repository's own source as rows of 64 tokens with themselves as labels."""

    def __init__(self, tokenizer: Any) -> None:
        text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "hf_subquad").glob("*.py")))
        ids = torch.tensor(tokenizer(text)["input_ids"])
        self.rows = ids[: len(ids) // 64 * 64].view(-1, 64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[row], "labels": self.rows[row]}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from /proc")
def test_two_thousand_steps_take_no_more_memory_nor_time_than_the_first(tmp_path: Path) -> None:
    """On the demo model with folds, refreshes, audits and reviews, at the least budget so that there is nothing to give
    back. Medians of quarters: of resident memory, and of the processor's time for a step over that for a fixed product
    beside it, since a busy machine is slower at both."""
    folder = ROOT / "scripts" / "demo_model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = SubquadConfig(rank=8, fold_steps=50, refresh_steps=20, tile_size=32, layers_to_transform="all_but_first")
    least = neuron_counts(model.config.ffn_dim)[0]
    model = watched(model, config, [least] * 5, error=0.9)
    fixed = torch.randn(600, 600)
    memory, steps, products = [], [], []
    ended = time.process_time()

    def look(*_: Any, **__: Any) -> None:
        nonlocal ended
        memory.append(resident_bytes())
        steps.append(time.process_time() - ended)
        begun = time.process_time()
        for _ in range(4):
            fixed @ fixed
        ended = time.process_time()
        products.append(ended - begun)

    run = trainer(model, tmp_path, [Watch(look)], max_steps=2000, per_device_train_batch_size=2, logging_steps=50,
                  learning_rate=5e-4, save_strategy="steps", save_steps=500, save_total_limit=1)  # fmt: skip
    run.train_dataset = Rows(AutoTokenizer.from_pretrained(folder))
    run.train()

    def by_quarter(values: list[float]) -> list[float]:
        return [statistics.median(values[i : i + 500]) for i in range(0, 2000, 500)]

    found = losses(run)
    resident, step, product = (by_quarter(values) for values in (memory, steps, products))
    relative = [a / b for a, b in zip(step, product, strict=True)]
    print(f"resident {resident} bytes, step {step} s, product {product} s, ratio {relative}, losses {found}")
    assert [mlp.k for mlp in sparse_mlps(model)] == [least] * 5
    assert resident[3] <= 1.02 * resident[1]
    assert relative[3] <= 1.1 * relative[1]
    assert len(found) == 40 and all(math.isfinite(loss) for loss in found)
    assert max(found[-10:]) < found[0] - 0.5
