"""One of several processes that train a planned model together: started by the tests, writes what it ended with."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from helpers.models import opt
from helpers.planning import budgets_of, set_times
from helpers.training import TRAIN, factors, losses, trainer
from pytest import MonkeyPatch

from hf_subquad import SubquadConfig, patch_model, sparse_mlps
from hf_subquad.patching import runtime_of

torch.set_num_threads(1)

if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    set_times(MonkeyPatch(), overhead=(0.2, 3.0)[rank])  # by itself, the second one would plan all dense
    config = {**TRAIN.to_dict(), "active": None, "tolerance": 1e-5}
    model = patch_model(opt(), SubquadConfig(**config))
    run = trainer(model, folder, max_steps=3, ddp_backend="gloo")
    run.train()
    found = {
        "plan": runtime_of(model).plan.to_dict(),
        "budgets": budgets_of(model),
        "compensations": [vars(mlp.compensation) if mlp.compensation else None for mlp in sparse_mlps(model)],
        "factors": factors(model),
        "errors": runtime_of(model).last_report.error,
        "losses": losses(run),
    }
    torch.save(found, folder / f"rank{rank}.pt")
