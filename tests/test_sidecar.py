"""Is the resume file written whole or not at all, and refused when damaged or of another model?"""

import ast
import errno
import io
import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import CONFIG, build, fill_updates, llama, opt, tokens
from helpers.planning import text_batches
from helpers.training import TRAIN, factors
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import hf_subquad
from hf_subquad import (
    NotPatchedError,
    OutputError,
    SidecarError,
    SubquadConfig,
    atomic_files,
    compensate,
    load_sidecar,
    patch_model,
    save_sidecar,
    sparse_mlps,
)
from hf_subquad.layers.budget import Budget
from hf_subquad.training import sidecar

NAME = "subquad_state.safetensors"


def trained(make=opt, **values: object) -> nn.Module:
    model = patch_model(make(), SubquadConfig(**{**CONFIG.to_dict(), **values}))
    fill_updates(model)
    return model


def holding(saved: nn.Module, make=opt, **values: object) -> nn.Module:
    """A fresh patched model with the plain checkpoint of `saved` loaded, as the Trainer does on resume."""
    model = patch_model(make(), SubquadConfig(**{**CONFIG.to_dict(), **values}))
    model.load_state_dict(saved.state_dict())
    return model


def everything(model: nn.Module) -> dict[str, Any]:
    """All of a patched model that loading may change, and the random state."""
    return {
        **{name: value.detach().clone() for name, value in model.named_parameters()},
        "random": torch.get_rng_state(),
        "flags": [(name, value.requires_grad, value.stride()) for name, value in model.named_parameters()],
        "modes": [module.training for module in model.modules()],
        "indices": [(id(m.index.sketch), id(m.index.output_norms), dict(m.corrections)) for m in sparse_mlps(model)],
        "budgets": [m.budget for m in sparse_mlps(model)],
        "plan": sparse_mlps(model)[0].runtime.plan,
        "step": sparse_mlps(model)[0].runtime.synced_step,
        "restarts": restarts(model),
    }


def unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    for name, value in everything(model).items():
        assert torch.equal(before[name], value) if isinstance(value, torch.Tensor) else before[name] == value, name


def refused(model: nn.Module, folder: Path, words: str) -> None:
    before = everything(model)
    with pytest.raises(SidecarError, match=words):
        load_sidecar(model, folder)
    unchanged(model, before)


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Change the contents of a sidecar, with a checksum that is right for them, as another version might write it."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["subquad"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(about, tensors)
    text = json.dumps(about)
    save_file(tensors, path, {"subquad": text, "digest": sidecar._digest(text, tensors)})


def restarts(model: nn.Module) -> list[int]:
    return [p.update.restarts for m in sparse_mlps(model) for p in m.projections]


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_round_trip(tmp_path: Path, family: str) -> None:
    make = lambda: build(family)  # noqa: E731
    saved = trained(make)
    assert save_sidecar(saved, tmp_path, 41) == tmp_path / NAME
    model = holding(saved, make)
    assert all(p.update.is_zero() for m in sparse_mlps(model) for p in m.projections)
    assert load_sidecar(model, tmp_path) == 41
    assert restarts(model) == restarts(saved)
    assert len(factors(saved)) == 8
    for name, value in factors(saved).items():
        assert torch.equal(factors(model)[name], value)
    for name, value in saved.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=0, atol=1e-6)


def test_corrections_of_two_classes(tmp_path: Path) -> None:
    """Both of an MLP's corrections project on the basis of its sketch."""
    batch = {"input_ids": tokens(1, (3, 9)), "labels": tokens(1, (3, 9))}
    batch["labels"][:, :5] = -100
    saved = trained()
    for mlp in sparse_mlps(saved):
        mlp.set_budget(Budget(20, 10))
    compensate(saved, [batch])
    assert all(set(mlp.corrections) == {"predicted", "context"} for mlp in sparse_mlps(saved))
    save_sidecar(saved, tmp_path, 3)
    model = holding(saved)
    load_sidecar(model, tmp_path)
    for mlp, other in zip(sparse_mlps(model), sparse_mlps(saved), strict=True):
        for name, correction in other.corrections.items():
            for part, values in vars(correction).items():
                assert torch.equal(getattr(mlp.corrections[name], part), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_round_trip_of_a_half_precision_model(tmp_path: Path, dtype: torch.dtype) -> None:
    """What the model computes is kept up to two roundings of the weight; factors to the bit."""
    make = lambda: opt(dtype)  # noqa: E731
    saved = trained(make)
    save_sidecar(saved, tmp_path, 1)
    model = holding(saved, make)
    load_sidecar(model, tmp_path)
    for mine, theirs in zip(sparse_mlps(model), sparse_mlps(saved), strict=True):
        for p, q in zip(mine.projections, theirs.projections, strict=True):
            assert torch.equal(p.update.U, q.update.U) and torch.equal(p.update.V, q.update.V)
            size = q.merged_rows().abs().max().float() + q.rows().abs().max().float()
            error = (p.merged_rows().float() - q.merged_rows().float()).abs().max()
            assert error <= 2 * torch.finfo(dtype).eps * size


def test_the_file_is_written_in_place_of_an_old_one(tmp_path: Path) -> None:
    saved = trained()
    save_sidecar(saved, tmp_path, 1)
    save_sidecar(saved, tmp_path, 2)
    assert [f.name for f in tmp_path.iterdir()] == [NAME]
    assert load_sidecar(holding(saved), tmp_path) == 2


def test_the_file_is_as_readable_as_others(tmp_path: Path) -> None:
    save_sidecar(trained(), tmp_path, 1)
    (tmp_path / "other").write_text("")
    assert (tmp_path / NAME).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_missing_file_and_unpatched_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_sidecar(trained(), tmp_path)
    with pytest.raises(NotPatchedError):
        save_sidecar(opt(), tmp_path, 1)
    assert not list(tmp_path.iterdir())


def spread(length: int, header: int, count: int) -> list[int]:
    """Places all over the file, the header more densely."""
    return sorted(
        {*range(0, header, max(1, header // count)), *range(header, length, max(1, length // count)), length - 1}
    )


def parts(tmp_path: Path) -> tuple[nn.Module, bytes, int]:
    saved = trained()
    data = save_sidecar(saved, tmp_path, 5).read_bytes()
    return saved, data, 8 + int.from_bytes(data[:8], "little")


def test_truncated_anywhere(tmp_path: Path) -> None:
    saved, data, header = parts(tmp_path)
    model = holding(saved)
    before = everything(model)
    places = [0, 1, 7, 8, 9, header - 1, header, *spread(len(data), header, 60)]
    assert len(places) > 100
    for length in places:
        (tmp_path / NAME).write_bytes(data[:length])
        with pytest.raises(SidecarError, match=NAME):
            load_sidecar(model, tmp_path)
    unchanged(model, before)
    (tmp_path / NAME).write_bytes(data)
    assert load_sidecar(model, tmp_path) == 5


def test_bits_flipped_anywhere(tmp_path: Path) -> None:
    """A flip either is found, or is in padding and changes nothing that is read."""
    saved, data, header = parts(tmp_path)
    model = holding(saved)
    before = everything(model)
    undetected = []
    places = spread(len(data), header, 250)
    assert len(places) > 400
    for number, place in enumerate(places):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (number % 8)
        (tmp_path / NAME).write_bytes(damaged)
        try:
            load_sidecar(model, tmp_path)
        except SidecarError as error:
            assert NAME in str(error)
        else:
            undetected.append(place)
            assert torch.equal(
                factors(model)["model.decoder.layers.1.fc1.U"], factors(saved)["model.decoder.layers.1.fc1.U"]
            )
            model = holding(saved)
            before = everything(model)
    assert all(8 < place < header and data[place : place + 1] == b" " for place in undetected), undetected
    unchanged(model, before)


@pytest.mark.parametrize(
    "data", [b"", b"x", b"\0" * 8, b"\xff" * 64, b'{"a": 1}' * 100, random.Random(0).randbytes(4096)]
)
def test_other_files_under_its_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / NAME).write_bytes(data)
    with pytest.raises(SidecarError, match=NAME):
        load_sidecar(trained(), tmp_path)


def test_plain_safetensors_under_its_name(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / NAME)
    with pytest.raises(SidecarError):
        load_sidecar(trained(), tmp_path)


def other_weights() -> nn.Module:
    model = trained()
    with torch.no_grad():
        model.get_parameter("model.decoder.layers.2.fc2.weight").mul_(1.01)
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: trained(llama), "patched"),
        (lambda: trained(layers_to_transform="all"), "patch the same layers"),
        (lambda: trained(layers_to_transform=[1]), "patch the same layers"),
        (lambda: trained(rank=4), "rank=3: use the rank"),
        (lambda: trained(lambda: opt(ffn_dim=60)), "does not belong to the weights"),
        (other_weights, "does not belong to the weights"),
        (lambda: patch_model(opt(), CONFIG), "does not belong to the weights"),
    ],
    ids=["family", "more layers", "fewer layers", "rank", "width", "one weight", "weights before training"],
)
def test_sidecar_of_another_model(tmp_path: Path, model, words: str) -> None:
    save_sidecar(trained(), tmp_path, 1)
    refused(model(), tmp_path, words)


FIRST = "model.decoder.layers.1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda about, tensors: tensors.pop(f"{FIRST}.fc1.V"), r"differs in.*fc1\.V"),
        (lambda about, tensors: tensors.pop(f"{FIRST}.norms"), r"differs in.*norms"),
        (lambda about, tensors: tensors.pop(f"{FIRST}.correction.predicted.bias"), r"differs in.*predicted\.bias"),
        (lambda about, tensors: tensors.update(more=torch.zeros(2)), r"differs in.*more"),
        (lambda about, tensors: about.update(format=3), "format 3, this version reads 2"),
        (lambda about, tensors: tensors[f"{FIRST}.fc2.U"].fill_(math.nan), r"NaN.*fc2\.U.*diverged"),
    ],
    ids=["factor missing", "norms missing", "part missing", "one more", "newer format", "NaN"],
)
def test_whole_files_with_other_contents(tmp_path: Path, change: Any, words: str) -> None:
    saved = trained()
    compensate(saved, text_batches(0, 1))
    path = save_sidecar(saved, tmp_path, 1)
    rewritten(path, lambda about, tensors: None)
    assert load_sidecar(holding(saved), tmp_path) == 1
    rewritten(path, change)
    refused(holding(saved), tmp_path, words)


def test_a_diverged_run_is_not_resumed(tmp_path: Path) -> None:
    saved = trained()
    with torch.no_grad():
        sparse_mlps(saved)[1].inputs[0].update.U[2, 1] = math.nan
    save_sidecar(saved, tmp_path, 1)
    refused(patch_model(opt(), CONFIG), tmp_path, "diverged")


@pytest.mark.parametrize("beside_peft", [False, True])
def test_another_alpha(tmp_path: Path, beside_peft: bool) -> None:
    """The same factors would be another update."""

    def made(**values: Any) -> nn.Module:
        model = patch_model(opt(), SubquadConfig(**{**CONFIG.to_dict(), **values}))
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])) if beside_peft else model

    saved = made()
    fill_updates(saved)
    save_sidecar(saved, tmp_path, 1)
    for rank, alpha, words in ((3, 6.0, r"alpha=5\.0"), (6, 10.0, "use the rank")):
        other = made(rank=rank, alpha=alpha)
        if not beside_peft:
            other.load_state_dict(saved.state_dict())
        refused(other, tmp_path, words)


def test_another_seed_is_no_other_model(tmp_path: Path) -> None:
    """It is that of draws to come."""
    saved = trained()
    save_sidecar(saved, tmp_path, 1)
    model = holding(saved, seed=5)
    load_sidecar(model, tmp_path)
    assert all(torch.equal(factors(model)[name], value) for name, value in factors(saved).items())


def test_a_folder_under_its_name(tmp_path: Path) -> None:
    """Not a missing file, after which training would go on with fresh updates."""
    (tmp_path / NAME).mkdir()
    refused(trained(), tmp_path, NAME)
    with pytest.raises(OutputError, match=NAME):
        save_sidecar(trained(), tmp_path, 1)
    assert [f.name for f in tmp_path.iterdir()] == [NAME]


def test_a_changed_middle_of_a_weight_is_noticed(tmp_path: Path) -> None:
    """Another fine-tune of the same base differs nearly everywhere, so that sampling some values suffices."""
    saved = trained()
    save_sidecar(saved, tmp_path, 1)
    fill_updates(saved, seed=4)
    with pytest.raises(SidecarError, match="does not belong"):
        load_sidecar(holding(saved), tmp_path)


def test_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match=NAME) as caught:
        save_sidecar(trained(), tmp_path / "out", 1)
    assert isinstance(caught.value, OSError)
    with pytest.raises(OutputError):
        save_sidecar(trained(), tmp_path / "nowhere", 1)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


class FullFile(io.BytesIO):
    """A file on a disk that has room for some bytes of it."""

    def __init__(self, path: Path, room: int) -> None:
        super().__init__()
        self.path, self.room = path, room

    def write(self, data: bytes) -> int:
        self.path.write_bytes(data[: self.room])
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fails", ["open", "write", "fsync", "replace", "interrupt"])
def test_failed_write_leaves_nothing_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    saved = trained()
    old = save_sidecar(saved, tmp_path, 1).read_bytes()
    error = KeyboardInterrupt() if fails == "interrupt" else OSError(errno.ENOSPC, "No space left on device")

    def full(*_: object, **__: object) -> None:
        raise error

    if fails in ("open", "write"):
        with_room = lambda path, mode: full() if fails == "open" else FullFile(path, 100)  # noqa: E731
        monkeypatch.setattr(atomic_files, "open", with_room, raising=False)
    else:
        monkeypatch.setattr(os, "fsync" if fails == "interrupt" else fails, full)
    expected = KeyboardInterrupt if fails == "interrupt" else OutputError
    with pytest.raises(expected) as caught:
        save_sidecar(saved, tmp_path, 2)
    assert fails == "interrupt" or (str(tmp_path / NAME) in str(caught.value) and "No space" in str(caught.value))
    assert [f.name for f in tmp_path.iterdir()] == [NAME]
    assert (tmp_path / NAME).read_bytes() == old
    monkeypatch.undo()
    assert load_sidecar(holding(saved), tmp_path) == 1


def test_what_is_read_is_data() -> None:
    """Nothing in the library unpickles or evaluates: not in a sidecar, not in a plan."""
    sources = sorted(Path(hf_subquad.__file__).parent.rglob("*.py"))
    assert len(sources) > 25
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "marshal", "shelve", "dill", "joblib"}, (path.name, node.lineno)
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "compile", "__import__", "torch.load"}, (path.name, node.lineno)


def test_names_do_not_depend_on_a_peft_wrapper(tmp_path: Path) -> None:
    """Saved beside adapters and loaded beside adapters that were added in the other order."""
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    first = get_peft_model(patch_model(opt(), TRAIN), lora)
    fill_updates(first)
    for mlp in sparse_mlps(first):
        mlp.index.fold()
    fill_updates(first, seed=9)
    save_sidecar(first, tmp_path, 7)
    second = patch_model(get_peft_model(opt(), lora), TRAIN)
    assert load_sidecar(second, tmp_path) == 7
    assert all(torch.equal(factors(second)[n], v) for n, v in factors(first).items())
    for mine, theirs in zip(sparse_mlps(second), sparse_mlps(first), strict=True):
        for p, q in zip(mine.projections, theirs.projections, strict=True):
            assert torch.equal(p.rows(), q.rows())
