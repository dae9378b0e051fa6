"""Would a GPU take the kernels? All of a launch happens but the run: arguments, specialisation, compilation, limits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", minversion="3.3")

KERNELS = {
    *("_moments", "_project", "_project_group", "_place"),  # tiles
    *("_squares", "_scores", "_top"),  # their neurons
    *("_gathered_up", "_gathered_down", "_per_neuron"),
}


Launched = dict[str, list[dict[str, int]]]


def rehearsed(*arguments: Any) -> list[Launched]:
    """Each kernel's versions, in both passes and in the first."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "helpers.rehearsal", *map(str, arguments)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def counts(launched: Launched) -> dict[str, int]:
    return {name: sum(version["launches"] for version in versions) for name, versions in launched.items()}


@pytest.mark.slow
def test_one_forward_and_backward() -> None:
    both, launched = rehearsed(90, "bfloat16", "gated", 256, 1024, 16, 64)
    assert set(both) == set(launched) == KERNELS
    launches = counts(launched)
    # Tiles of a part of the tokens need the same launches; half as many tokens are bisected once less.
    assert all(count < 2 * launches[name] + 1 for name, count in counts(both).items())
    for name in ("_gathered_up", "_gathered_down", "_per_neuron", "_squares", "_scores", "_top"):
        assert counts(both)[name] == 2 * launches[name], name
    assert launches["_gathered_up"] == 2  # gate and up in one, and the gradient out of the MLP
    assert launches["_gathered_down"] == 5  # out, into gate and up in one, and the products with U of three matrices
    assert launches["_per_neuron"] == 3
    assert launches["_squares"] == launches["_scores"] == launches["_top"] == 1
    assert sum(launches.values()) < 35
    for name in ("_gathered_up", "_gathered_down"):
        for version in launched[name]:
            assert version["tensor"] and version["wide_copies"] and not version["narrow_copies"], (name, version)
    assert all(version["wgmma"] for version in launched["_gathered_up"])
    assert sum(version["wgmma"] > 0 for version in launched["_gathered_down"]) == 2  # the others, with U, are small
    for name in ("_squares", "_scores"):
        assert all(version["wgmma"] for version in launched[name])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("kind", "d", "m", "rank", "sketch_rank"),
    [
        ("plain", 256, 1024, 16, 64),
        ("plain", 64, 20480, 16, 64),  # more scores of a tile than a program holds
        ("gated", 256, 1024, 16, 64),
        ("gated", 256, 1024, 32, 64),  # the most shared memory
        ("gated", 256, 1024, 48, 64),
        ("stacked", 256, 1024, 16, 64),
        ("conv1d", 250, 1001, 16, 250),
    ],
    ids=str,
)
def test_devices_dtypes_and_shapes(
    capability: int, dtype: str, kind: str, d: int, m: int, rank: int, sketch_rank: int
) -> None:
    """What exceeds a device's shared memory is an error of Triton's."""
    launched, _ = rehearsed(capability, dtype, kind, d, m, rank, sketch_rank)
    assert set(launched) == KERNELS
    for name in ("_squares", "_scores", "_gathered_up", "_gathered_down", "_per_neuron"):
        for version in launched[name]:  # PyTorch's default is not to multiply float32 in TF32
            assert (version["tensor"] > 0) == (dtype != "float32"), (name, version)
