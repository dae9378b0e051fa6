"""Does what is saved load anywhere, with the numbers the live model has?"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import CONFIG, FAMILIES, batch, build, logits, opt, tokens, trained
from helpers.training import patched_opt, trainer
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers.utils import hub

from hf_subquad import dense_forward, patch_model, sparse_mlps, unpatch_model

# Runs in a process of its own, where the library must not be needed.
LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder, ids = sys.argv[1], json.loads(sys.argv[2])
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert not any(name.startswith("hf_subquad") for name in sys.modules)
torch.save(model.eval()(torch.tensor(ids)).logits, folder + "/logits.pt")
"""


def load_elsewhere(folder: Path, ids: Tensor) -> Tensor:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), json.dumps(ids.tolist())], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "logits.pt")


def saved_tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    found = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape())
    return found


def live_dense(model: nn.Module, ids: Tensor) -> Tensor:
    with dense_forward(model), torch.no_grad():
        return model(ids).logits


def test_trained_checkpoint_loads_without_the_library(tmp_path: Path) -> None:
    opt().save_pretrained(tmp_path / "original")
    model = patched_opt(fold_steps=2)
    run = trainer(model, tmp_path, max_steps=5)
    run.train()
    run.save_model(str(tmp_path / "out"))
    ids = tokens(50)
    found = load_elsewhere(tmp_path / "out", ids)
    torch.testing.assert_close(found, live_dense(model, ids), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert (found - opt().eval()(ids).logits).abs().max() > 1e-2
    assert saved_tensors(tmp_path / "out") == saved_tensors(tmp_path / "original")
    assert {f.name for f in (tmp_path / "out").iterdir()} - {"training_args.bin", "logits.pt"} == {
        f.name for f in (tmp_path / "original").iterdir()
    }
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("out", "original")]
    assert configs[0] | {"use_cache": None} == configs[1] | {"use_cache": None}


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_of_every_family_equals_the_live_one(tmp_path: Path, family: str) -> None:
    original = build(family)
    original.save_pretrained(tmp_path / "original")
    model = trained(family)
    model.save_pretrained(tmp_path / "out")
    assert saved_tensors(tmp_path / "out") == saved_tensors(tmp_path / "original")
    again = type(original).from_pretrained(tmp_path / "out").eval()
    inputs = batch(family, model)
    expected = logits(model.eval(), inputs)
    torch.testing.assert_close(logits(again, inputs), expected, rtol=1e-4, atol=1e-5)
    assert (logits(original.eval(), inputs) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_bfloat16_model(tmp_path: Path, family: str) -> None:
    """Saved in bfloat16, W + s U V accumulated in float32 and rounded once."""
    model = trained(family, torch.bfloat16, size=0.02)
    model.save_pretrained(tmp_path)
    assert {dtype for dtype, _ in saved_tensors(tmp_path).values()} == {"BF16"}
    again = type(model).from_pretrained(tmp_path)
    for mlp in sparse_mlps(model):
        for path, p in zip(mlp.sources, mlp.projections, strict=True):
            whole = p.rows().float() + (5 / 3) * (p.update.U @ p.update.V)
            whole = whole if p.weight_is_rows else whole.t()
            assert torch.equal(again.get_parameter(f"{mlp.name}.{path}.weight"), whole.to(torch.bfloat16))
            assert not torch.equal(p.rows(), p.merged_rows())


def test_sharded(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ids = tokens(51)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, live_dense(model.eval(), ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_load_of_its_own_state_keeps_the_dense_model(family: str) -> None:
    """Loaded weights are whole: the update, which comes back with them, must not be counted twice."""
    model = trained(family).eval()
    inputs = batch(family, model)
    expected = logits(model, inputs)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    result = model.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    assert not any(p.update.is_zero() for mlp in sparse_mlps(model) for p in mlp.projections)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-6, atol=1e-6)
    model.train()
    logits(model, inputs).sum().backward()


@pytest.mark.parametrize("assign", [False, True])
def test_load_of_other_weights(assign: bool) -> None:
    model, other = trained(), opt()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    model.load_state_dict(other.state_dict(), assign=assign)
    ids = tokens(52)
    assert torch.equal(model.eval()(ids).logits, other.eval()(ids).logits)
    model.train()(ids).logits.sum().backward()
    assert all(not p.weight.requires_grad for mlp in sparse_mlps(model) for p in mlp.projections)
    assert all(mlp.index._seen == mlp.index._base_version() for mlp in sparse_mlps(model))
    unpatched = unpatch_model(model)
    assert torch.equal(unpatched.eval()(ids).logits, other(ids).logits)


def test_load_that_fails_keeps_the_update() -> None:
    model = trained().eval()
    expected = model(tokens()).logits
    state = model.state_dict()
    state["model.decoder.layers.1.fc1.weight"] = torch.zeros(3, 3)
    only = {"model.decoder.layers.1.fc1.weight": torch.zeros(3, 3)}
    for wrong, strict in ((only, False), (state, True)):
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict(wrong, strict=strict)
        assert not sparse_mlps(model)[0].inputs[0].update.is_zero()
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-5)


def test_partial_load_touches_only_what_it_names() -> None:
    model = trained().eval()
    name = "model.decoder.layers.1.fc1"
    model.load_state_dict({f"{name}.weight": 1.5 * model.state_dict()[f"{name}.weight"]}, strict=False)
    zero = {
        f"{m.name}.{p}": q.update.is_zero()
        for m in sparse_mlps(model)
        for p, q in zip(m.sources, m.projections, strict=True)
    }
    assert [key for key, value in zero.items() if value] == [name]


def test_missing_weight_is_reported() -> None:
    model = patch_model(opt(), CONFIG)
    state = model.state_dict()
    del state["model.decoder.layers.2.fc2.weight"]
    with pytest.raises(RuntimeError, match=r"layers\.2\.fc2\.weight"):
        model.load_state_dict(state)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    model = trained("gpt2")
    before = {n: (id(p), p.stride(), p.requires_grad, p.clone()) for n, p in model.named_parameters()}
    model.save_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        identity, stride, trainable, value = before[name]
        assert (id(parameter), parameter.stride(), parameter.requires_grad) == (identity, stride, trainable)
        assert torch.equal(parameter, value)


def test_trainer_checkpoints_are_plain(tmp_path: Path) -> None:
    opt().save_pretrained(tmp_path / "original")
    model = patched_opt()
    trainer(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    assert saved_tensors(tmp_path / "checkpoint-2") == saved_tensors(tmp_path / "original")
    again = type(model).from_pretrained(tmp_path / "checkpoint-2").eval()
    ids = tokens(53)
    torch.testing.assert_close(again(ids).logits, live_dense(model, ids), rtol=1e-4, atol=1e-5)


def test_what_is_pushed_to_the_hub_is_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def receive(operations: list[Any], **about: Any) -> None:
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, tmp_path / operation.path_in_repo)

    server = SimpleNamespace(
        create_repo=lambda *args, **about: SimpleNamespace(repo_id="me/mine"), create_commit=receive
    )
    card = SimpleNamespace(save=lambda path: Path(path).write_text("---\n---\n"))
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **about: card)
    monkeypatch.setattr(hub, "hf_api", lambda: server, raising=False)  # by newer versions
    for name, function in vars(server).items():
        monkeypatch.setattr(hub, name, function, raising=False)  # by older ones

    model = trained()
    model.push_to_hub("me/mine")
    ids = tokens(54)
    opt().save_pretrained(tmp_path / "original")
    assert {f.name for f in tmp_path.glob("*.*")} == {"README.md"} | {f.name for f in (tmp_path / "original").iterdir()}
    assert saved_tensors(tmp_path) == saved_tensors(tmp_path / "original")
    pulled = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(pulled(ids).logits, live_dense(model.eval(), ids), rtol=1e-4, atol=1e-5)


def test_safetensors_own_functions(tmp_path: Path) -> None:
    model, plain = trained(), opt()
    save_model(model, str(tmp_path / "model.safetensors"))
    load_model(plain, tmp_path / "model.safetensors")
    expected = live_dense(model.eval(), tokens())
    torch.testing.assert_close(live_dense(patch_model(plain.eval(), CONFIG), tokens()), expected, rtol=1e-4, atol=1e-5)
    load_model(model, tmp_path / "model.safetensors")  # whole weights: the update must not count twice
    torch.testing.assert_close(live_dense(model, tokens()), expected, rtol=1e-4, atol=1e-5)
