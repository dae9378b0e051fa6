"""Is no checkpoint taken for whole that a killed process left half-written, and is the newest whole one found?

At the third save of a run, a forked child goes on with the save in a copy of the output folder and kills itself, once
for every step of the writing: before each file, with half of it written, and after it.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.training import StopAt, Watch, losses, patched_opt, trainer
from transformers import Trainer, TrainerState

from hf_subquad import last_whole_checkpoint, sparse_mlps

HERE = Path(__file__).resolve().parent
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "save_total_limit": 2}


class Crashes:
    """Kills the process at the n-th step of writing files; counts them without end if there is no n."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.steps: list[str] = []

    def step(self, name: str, spoil: Callable[[], None] | None = None) -> None:
        self.steps.append(name)
        if len(self.steps) - 1 == self.at:
            if spoil:
                spoil()
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, write: Callable[..., Any], path_at: int) -> Callable[..., Any]:
        def crashing(*args: Any, **kwargs: Any) -> Any:
            path = kwargs.get("filename", args[path_at] if len(args) > path_at else None)
            name = Path(path).name
            self.step(f"before {name}")
            result = write(*args, **kwargs)
            if Path(path).is_file():
                self.step(f"half of {name}", lambda: os.truncate(path, os.path.getsize(path) // 2))
            self.step(f"after {name}")
            return result

        return crashing

    def install(self, patch: pytest.MonkeyPatch) -> None:
        modeling = sys.modules["transformers.modeling_utils"]
        patch.setattr(modeling, "safe_save_file", self.wrap(modeling.safe_save_file, 1))
        patch.setattr(torch, "save", self.wrap(torch.save, 1))
        patch.setattr(TrainerState, "save_to_json", self.wrap(TrainerState.save_to_json, 1))
        config = transformers.PretrainedConfig
        patch.setattr(config, "to_json_file", self.wrap(config.to_json_file, 1))
        patch.setattr(shutil, "rmtree", self.wrap(shutil.rmtree, 0))
        fsync = os.fsync

        def flush(number: int) -> None:
            self.step("half of the sidecar", lambda: os.ftruncate(number, os.fstat(number).st_size // 2))
            fsync(number)

        patch.setattr(os, "fsync", flush)
        patch.setattr(os, "replace", self.wrap(os.replace, 1))


class CrashAtEveryStep:
    """Runs a save of the Trainer once for each of its steps, in children that do not survive it; then for real."""

    def __init__(self, run: Trainer, folder: Path) -> None:
        self.run, self.folder, self.output = run, folder, Path(run.args.output_dir)
        self.left: dict[str, Path] = {}  # output folders by the step at which the child was killed

    def save(self, write: Callable[[], None]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            known = Crashes()
            known.install(patch)
            self.copy("nothing")
            self.run.args.output_dir = str(self.copy("complete"))
            write()
        for number, name in enumerate(known.steps):
            self.run.args.output_dir = str(self.copy(f"{number}: {name}"))
            child = os.fork()
            if child == 0:
                try:
                    with pytest.MonkeyPatch.context() as patch:
                        Crashes(number).install(patch)
                        write()
                finally:
                    os._exit(1)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, name
        self.run.args.output_dir = str(self.output)

    def copy(self, name: str) -> Path:
        self.left[name] = folder = self.folder / name
        shutil.copytree(self.output, folder)
        return folder


@pytest.fixture(scope="module", params=["new folder", pytest.param("over an older checkpoint", marks=pytest.mark.slow)])
def crashed(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], list[float]]:
    """What children that were killed in the third save left, and the losses of a run that was not."""
    folder = tmp_path_factory.mktemp("crashed")
    settings = SAVING
    if request.param != "new folder":  # of another run; deleting the oldest would go by the clock
        settings = {**SAVING, "save_total_limit": None}
        older = trainer(patched_opt(seed=1), folder / "run", learning_rate=0.1, **{**settings, "max_steps": 3})
        older.train()
        shutil.rmtree(folder / "run" / "checkpoint-2")
    run = trainer(patched_opt(), folder / "run", **settings)
    crash = CrashAtEveryStep(run, folder)
    maybe_save = Trainer._maybe_log_save_evaluate

    def third_crashes(self: Trainer, *args: Any, **kwargs: Any) -> None:
        if self is run and self.state.global_step == 3 and self.control.should_save:
            self.control.should_save = False
            maybe_save(self, *args, **kwargs)  # logs

            def write() -> None:
                self.control.should_save, self.control.should_log = True, False
                maybe_save(self, *args, **kwargs)

            crash.save(write)
            self.control.should_save = True
        maybe_save(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_maybe_log_save_evaluate", third_crashes)
        run.train()
    assert len(losses(run)) == 5
    return crash.left, losses(run)


def resume(folder: Path, checkpoint: Any) -> Trainer:
    run = trainer(patched_opt(), folder, **{**SAVING, "save_strategy": "no"})
    run.train(resume_from_checkpoint=checkpoint)
    return run


def test_the_newest_whole_checkpoint_is_found(crashed: Any) -> None:
    """That of step 3 where all was written, or nothing yet over an older one, and that of step 2 everywhere else."""
    left, _ = crashed
    before, complete = contents(left["nothing"] / "checkpoint-3"), ("complete", list(left)[-1])
    assert len(left) == (27 if before else 29) and complete[1].endswith("after subquad_state.safetensors")
    for name, folder in left.items():
        as_before = bool(before) and contents(folder / "checkpoint-3") == before
        newest = "checkpoint-3" if name in complete or as_before else "checkpoint-2"
        assert last_whole_checkpoint(folder) == str(folder / newest), name


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


@pytest.mark.parametrize("name", ["half of trainer_state.json", "before subquad_state.safetensors", "complete"])
def test_what_was_left_goes_on_as_if_nothing_had_been(crashed: Any, name: str) -> None:
    left, expected = crashed
    folder = next(folder for step, folder in left.items() if step.endswith(name))
    assert losses(resume(folder, last_whole_checkpoint(folder))) == pytest.approx(expected, abs=1e-4)


def test_the_highest_number_is_refused_where_it_is_not_whole(crashed: Any) -> None:
    """As `resume_from_checkpoint=True` takes it: an error before the first step, the Trainer's or this library's."""
    refused = 0
    for name, folder in crashed[0].items():
        if Path(last_whole_checkpoint(folder)).name == "checkpoint-3" or not (folder / "checkpoint-3").is_dir():
            continue
        run = trainer(patched_opt(), folder, **{**SAVING, "save_strategy": "no"})
        try:
            run.train(resume_from_checkpoint=True)
        except Exception:
            refused += 1
        else:
            pytest.fail(f"resumed from what was left by a crash {name}")
        assert not any(mlp.calls for mlp in sparse_mlps(run.model)), name
    assert refused > 20


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    """The first start of a script that always resumes."""
    assert last_whole_checkpoint(tmp_path / "none") is None
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path) is None
    run = trainer(patched_opt(), tmp_path, [StopAt(2)], **SAVING)
    run.train(resume_from_checkpoint=last_whole_checkpoint(tmp_path))
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_copied_checkpoint_is_whole_and_a_changed_one_is_not(tmp_path: Path) -> None:
    trainer(patched_opt(), tmp_path / "run", [StopAt(1)], **SAVING).train()
    copied = tmp_path / "copy" / "checkpoint-10"
    shutil.copytree(tmp_path / "run" / "checkpoint-1", copied, copy_function=shutil.copyfile)
    (copied / "README.md").write_text("added later")
    shutil.copytree(copied, copied.with_name("checkpoint-11-old"), copy_function=shutil.copyfile)
    assert last_whole_checkpoint(tmp_path / "copy") == str(copied)
    (copied / "optimizer.pt").unlink()
    assert last_whole_checkpoint(tmp_path / "copy") is None


@pytest.mark.slow
@pytest.mark.parametrize("lines", [3, 5, 8])
def test_kill_from_outside(tmp_path: Path, lines: int) -> None:
    """A process killed while it saves and trains goes on from what it left, as if nothing had been."""
    worker = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"},
    )  # fmt: skip
    assert worker.stdout is not None
    steps = (line for line in worker.stdout if line.startswith("step"))
    for _ in range(lines):
        next(steps)
    worker.kill()
    worker.wait()
    found = last_whole_checkpoint(tmp_path)
    assert found is not None and int(found.rpartition("-")[2]) >= lines - 1
    straight = trainer(patched_opt(), tmp_path / "straight", max_steps=12)
    straight.train()
    again = trainer(patched_opt(), tmp_path, max_steps=12)
    again.train(resume_from_checkpoint=found)
    assert losses(again) == pytest.approx(losses(straight), abs=1e-4)


if __name__ == "__main__":
    say = Watch(lambda _, step, **__: print("step", step, flush=True))
    trainer(patched_opt(), Path(sys.argv[1]), [say], save_strategy="steps", save_steps=1, max_steps=12).train()
