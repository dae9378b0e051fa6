"""Two processes on the CPU that train together: forks of this one, or by a launch."""

import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

TESTS = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_forks(work: Callable[[int, Path], Any], folder: Path) -> list[dict[str, Any]]:
    """What `work(rank, folder)` returns on two ranks, in the environment that a launcher gives them.
    What they printed is in `printed` in the folder. A fork need not import anything, but cannot use CUDA."""
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    port = free_port()
    ranks = [context.Process(target=_be_rank, args=(rank, port, work, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=240)
        if process.is_alive():  # it waits for the other
            process.kill()
    assert [process.exitcode for process in ranks] == [0, 0], (folder / "printed").read_text()[-5000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def _be_rank(rank: int, port: int, work: Callable[[int, Path], Any], folder: Path) -> None:
    printed = os.open(folder / "printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    logging.getLogger().handlers.clear()  # pytest's
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that was forked
    torch.save(work(rank, folder), folder / f"rank{rank}.pt")


def two_processes(script: str, folder: Path) -> list[dict[str, Any]]:
    """Launch a script of `tests/` on two ranks, and return what each wrote to `rank<n>.pt` in the folder, its argument.
    What they printed is in `printed` there."""
    port = free_port()
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port),
        str(TESTS / script), str(folder),
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, [str(TESTS.parent), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              start_new_session=True)  # fmt: skip
    try:
        printed, errors = launch.communicate(timeout=240)
    finally:
        if launch.poll() is None:  # ranks that wait for each other
            os.killpg(launch.pid, signal.SIGKILL)
    assert launch.returncode == 0, errors[-5000:]
    (folder / "printed").write_text(printed + errors)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def assert_same(one: Any, other: Any, place: str = "") -> None:
    """To the bit."""
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for name in one:
            assert_same(one[name], other[name], f"{place}/{name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{place}/{number}")
    else:
        assert one == other, place
