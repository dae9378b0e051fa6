"""Do patched MLPs train on a base in 4 bits as on the same base dequantised, and does the base stay in 4 bits?"""

import copy
import gc
import math
import pickle
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import models
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_subquad import (
    ConfigError,
    PatchError,
    SubquadCallback,
    SubquadConfig,
    UnsupportedModuleError,
    dense_forward,
    merged_named_weights,
    patch_model,
    save_merged,
    sparse_mlps,
    sync_model,
    unpatch_model,
)
from hf_subquad.layers.budget import Budget
from hf_subquad.layers.preserve_mode_and_rng import preserve_mode_and_rng
from hf_subquad.planning import step_timing
from hf_subquad.weights.quantized import dequantized, is_4bit, quant_state

bnb = pytest.importorskip("bitsandbytes")

WIDTH, NEURONS = 64, 192
CONFIG = SubquadConfig(rank=3, alpha=5.0, tile_size=5, sketch_rank=12, active=0.4, layers_to_transform="all_but_first")
BUDGETS = [Budget(), Budget(70, 70), Budget(150, 40), Budget(None, 0), Budget(100, 0, 0.9)]
FAMILIES = ("llama", "phi3", "opt", "gpt2")
SIZES = {
    "llama": dict(hidden_size=WIDTH, intermediate_size=NEURONS),
    "phi3": dict(hidden_size=WIDTH, intermediate_size=NEURONS),  # gate and up stacked
    "opt": dict(hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=NEURONS),
    "gpt2": dict(n_embd=WIDTH, n_inner=NEURONS),  # Conv1D
}


def plain(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return models.build(family, dtype, **SIZES[family])


def in_4bit(model: nn.Module, blocksize: int = 64, **settings: Any) -> nn.Module:
    """The model with every linear layer but the head in 4 bits, as `from_pretrained` quantises it."""
    settings = {"quant_type": "nf4", "compress_statistics": True, **settings}
    for name, module in list(model.named_modules()):
        if name.endswith("head") or not isinstance(module, nn.Linear | Conv1D):
            continue
        weight = module.weight.detach()
        weight = weight if isinstance(module, nn.Linear) else weight.t().contiguous()
        layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], module.bias is not None, **settings)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, blocksize=blocksize, **settings)
        if module.bias is not None:
            layer.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=False)
        model.set_submodule(name, layer.to("cpu").train())
    return model.requires_grad_(False)


def dequantised(model: nn.Module) -> nn.Module:
    """A copy with plain linear layers of the same values."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if is_4bit(module):
            layer = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            layer.weight = nn.Parameter(dequantized(module.weight, quant_state(module)))
            layer.bias = module.bias
            model.set_submodule(name, layer)
    return model.requires_grad_(False)


def patched_pair(family: str, budget: Budget | None = None, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """A model in 4 bits and its dequantised copy, both patched, with the same trained updates and budgets."""
    quantised = in_4bit(plain(family), **settings)
    pair = quantised, dequantised(quantised)
    for model in pair:
        patch_model(model, CONFIG)
        train_a_little(model)
        for mlp in sparse_mlps(model) if budget else ():
            mlp.set_budget(budget)
    return pair


@torch.no_grad()
def train_a_little(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_our_own_evaluations_leave_weights_as_they_are() -> None:
    """In evaluation mode, on some CPUs, bitsandbytes would pack them for good."""
    model = in_4bit(plain("llama"))
    before = [module.weight.clone() for module in model.modules() if is_4bit(module)]
    with preserve_mode_and_rng(model):
        assert not model.training and all(module.training == is_4bit(module) for module in model.modules())
        model(**labelled_batch())
    layers = [module for module in model.modules() if is_4bit(module)]
    assert all(module.training for module in model.modules())
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))


@pytest.mark.parametrize("quantised", [False, True])
def test_steps_are_timed_on_all_rows(quantised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dequantising takes as long for half of them."""
    seconds = iter([0.7, 0.6, 0.5])
    monkeypatch.setattr(step_timing, "_ENOUGH", 8)
    monkeypatch.setattr(step_timing, "timed", lambda work, device: next(seconds))
    model = patch_model(in_4bit(plain("llama")) if quantised else plain("llama"), CONFIG)
    batch = {"input_ids": torch.zeros(4, 6, dtype=torch.int64)}
    assert step_timing.time_steps(model, batch) == (0.6 if quantised else 2 * 0.5, None)


def labelled_batch() -> dict[str, Tensor]:
    ids = torch.randint(3, models.VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, :6] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    loss = model(**labelled_batch()).loss
    return loss.detach(), list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def assert_same_step(quantised: nn.Module, reference: nn.Module) -> None:
    """Equal up to float32 rounding: the products are the same, of the same values, and may only be laid out otherwise.

    A sum of n terms errs by at most sqrt(n) eps of its magnitude, in each of about ten products on a path through the
    layers, one after the other.
    """
    tolerance = 10 * NEURONS**0.5 * torch.finfo(torch.float32).eps
    loss, gradients = loss_and_gradients(quantised)
    expected_loss, expected = loss_and_gradients(reference)
    assert (loss - expected_loss).abs() <= tolerance * expected_loss
    assert len(gradients) == len(expected) > 0
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert wanted.any()
        assert (gradient - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_step_equals_that_of_the_dequantised_model(family: str, budget: Budget) -> None:
    assert_same_step(*patched_pair(family, budget))


@pytest.mark.parametrize(
    "settings",
    [{"compress_statistics": False}, {"quant_type": "fp4"}, {"blocksize": 128}, {"quant_storage": torch.bfloat16}],
    ids=str,
)
def test_every_storage(settings: dict[str, Any]) -> None:
    """Blocks of 128 do not divide rows of 64 values, so rows are read with the whole weight."""
    assert_same_step(*patched_pair("llama", Budget(30, 30), **settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_passes_equal_those_of_the_dequantised_model(family: str) -> None:
    pair = patched_pair(family)
    with dense_forward(pair[0]), dense_forward(pair[1]):
        assert_same_step(*pair)


def test_a_wrong_scale_is_noticed() -> None:
    quantised, reference = patched_pair("llama")
    state = sparse_mlps(quantised)[0].inputs[1].quantization
    state.offset = state.offset * 1.01
    with pytest.raises(AssertionError):
        assert_same_step(quantised, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_rows_are_those_of_the_whole_weight(family: str, dtype: torch.dtype) -> None:
    model = patch_model(in_4bit(plain(family, torch.bfloat16)), CONFIG)
    for projection in sparse_mlps(model)[0].projections:
        whole = projection.rows()
        assert whole.dtype == torch.bfloat16 and whole.shape == projection.shape
        rows: Any = projection.matrix(dtype, contiguous=True).rows
        assert torch.equal(rows.load(), whole.to(dtype)) and rows.load().is_contiguous()
        chosen = torch.tensor([[5, 0, 63], [64, 5, len(whole) - 1]])
        assert torch.equal(rows.load(chosen)[chosen], whole.to(dtype)[chosen])
        if projection.is_input:  # nothing else was read
            others = torch.ones(len(whole), dtype=torch.bool).index_fill_(0, chosen.flatten(), False)
            assert not rows.load(chosen)[others].any()
        second = rows[len(whole) // 2 :]
        assert torch.equal(second.load(torch.tensor([3]))[3], whole.to(dtype)[len(whole) // 2 + 3])
        assert not rows.load(torch.empty(0, dtype=torch.int64)).any() or not projection.is_input


def full_precision_copies(model: nn.Module, others: list[Tensor]) -> list[torch.Size]:
    """Floating-point tensors in memory, but for `others`, that may hold a patched weight."""
    sizes, known = {math.prod(p.shape) for mlp in sparse_mlps(model) for p in mlp.projections}, set(map(id, others))
    return [value.shape for value in floats() if value.numel() in sizes and id(value) not in known]


def floats() -> list[Tensor]:
    """All floating-point tensors in memory."""
    gc.collect()
    return [value for value in gc.get_objects() if isinstance(value, Tensor) and value.is_floating_point()]


@pytest.mark.parametrize("family, budget", [*((name, BUDGETS[2]) for name in FAMILIES), ("llama", None)], ids=str)
def test_weights_stay_in_4_bits(family: str, budget: Budget | None) -> None:
    """After the patch, between the passes (nothing is kept for the backward pass), and after an optimizer step."""
    model = in_4bit(plain(family))
    others = floats()  # of tests before this one
    bytes_before = {name: weight.nbytes for name, weight in model.named_parameters()}
    packed = {name: weight.clone() for name, weight in model.named_parameters() if weight.dtype == torch.uint8}
    patch_model(model, CONFIG)
    for mlp in sparse_mlps(model):
        mlp.set_budget(budget or Budget())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sync_model(model, 0, optimizer)
    with dense_forward(model) if budget is None else nullcontext():
        loss = model(**labelled_batch()).loss
    assert not full_precision_copies(model, others)
    loss.backward()
    optimizer.step()
    sync_model(model, 1, optimizer)
    assert not full_precision_copies(model, others)
    after = {name: weight for name, weight in model.named_parameters() if ".update." not in name}
    assert {name: weight.nbytes for name, weight in after.items()} == bytes_before
    assert len(packed) > 6 and all(torch.equal(after[name], weight) for name, weight in packed.items())


def test_copies_and_moves_compute_the_same() -> None:
    model, _ = patched_pair("llama")
    expected, _ = loss_and_gradients(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).to("cpu")):
        assert torch.equal(loss_and_gradients(copied)[0], expected)
    assert loss_and_gradients(copy.deepcopy(model).to(torch.bfloat16))[0].isfinite()
    assert all(p.weight.dtype == torch.uint8 for mlp in sparse_mlps(model) for p in mlp.projections)


def test_unpatched_model_is_as_before() -> None:
    model = in_4bit(plain("llama"))
    reference = copy.deepcopy(model)
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    unpatch_model(patch_model(model, CONFIG))
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in reference.named_modules()
    }
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    assert torch.equal(model(**labelled_batch()).loss, reference(**labelled_batch()).loss)
    patch_model(model, CONFIG)
    train_a_little(model)
    with pytest.raises(PatchError, match="save_merged"):
        unpatch_model(model)
    assert sparse_mlps(model)


@pytest.mark.parametrize("make", [nn.Linear, bnb.nn.Linear8bitLt, bnb.nn.Linear4bit])
def test_refused_by_name_and_unchanged(make: type[nn.Module]) -> None:
    """Not all folded, 8 bits, and 4 bits that are not quantised yet."""
    model = in_4bit(plain("llama"))
    config = CONFIG
    if make is nn.Linear:
        config, error, said = replace(CONFIG, fold_steps=5), ConfigError, "fold_steps=5.*mlp.gate_proj"
    else:
        odd = make(WIDTH, NEURONS, bias=False)
        odd = odd.to("cpu") if make is bnb.nn.Linear8bitLt else odd
        model.model.layers[2].mlp.up_proj = odd
        error, said = UnsupportedModuleError, "layers.2.mlp.up_proj"
    modules = dict(model.named_modules())
    with pytest.raises(error, match=said):
        patch_model(model, config)
    assert dict(model.named_modules()) == modules


def test_what_would_write_into_4_bits_is_refused() -> None:
    model, _ = patched_pair("llama")
    with pytest.raises(PatchError, match="save_merged"):
        model.state_dict()
    with pytest.raises(PatchError, match="save_merged"):
        sparse_mlps(model)[0].index.fold()
    with pytest.raises(RuntimeError, match="in 4 bits and cannot be loaded into"):
        model.load_state_dict(dict(merged_named_weights(model)), strict=False)


def checkpoint(folder: Path) -> Path:
    """A plain one that `from_pretrained` can quantise."""
    plain("llama", torch.bfloat16).save_pretrained(folder)
    return folder


def loaded_in_4bit(folder: Path) -> nn.Module:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=settings, device_map="cpu"
    )
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.parametrize("patched_first", [True, False])
def test_trains_with_lora_on_the_rest_and_resumes(tmp_path: Path, patched_first: bool) -> None:
    """As QLoRA, by the Trainer, which refuses quantised models without adapters."""
    base = checkpoint(tmp_path / "base")
    config = replace(CONFIG, refresh_steps=2)

    def trainer() -> Trainer:
        model: Any = loaded_in_4bit(base)
        if patched_first:
            model = get_peft_model(patch_model(model, config), LORA)
        else:
            attention = replace(LORA, target_modules=["q_proj", "v_proj"])
            model = patch_model(get_peft_model(model, attention), config)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=4, save_steps=2, per_device_train_batch_size=3,
            learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        batch = labelled_batch()
        rows = [{name: values[i % 3] for name, values in batch.items()} for i in range(12)]
        return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[SubquadCallback()])

    first = trainer()
    first.train()
    trained = {name: weight for name, weight in first.model.named_parameters() if weight.requires_grad}
    assert any("lora_" in name for name in trained) and any(".update." in name for name in trained)
    assert all(weight.isfinite().all() for weight in trained.values())
    second = trainer()
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    resumed = dict(second.model.named_parameters())
    assert all(torch.equal(weight, resumed[name]) for name, weight in trained.items())


@pytest.mark.parametrize("adapters", [True, False])
def test_export_is_a_plain_dequantised_checkpoint(tmp_path: Path, adapters: bool) -> None:
    model: Any = patch_model(loaded_in_4bit(checkpoint(tmp_path / "base")), CONFIG)
    model = get_peft_model(model, LORA) if adapters else model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or ".update." in name)
    train_a_little(model)
    save_merged(model, tmp_path / "out")
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {type(m) for m in loaded.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert not any(".update." in name or "lora_" in name for name in loaded.state_dict())
    logits = loaded(torch.tensor([[5, 9, 7]])).logits
    with torch.no_grad():
        expected = model.eval()(torch.tensor([[5, 9, 7]])).logits.float()
    # Merged weights are rounded to bfloat16, and the plain model computes in it: each of its ten products a layer does.
    tolerance = 10 * models.LAYERS * torch.finfo(torch.bfloat16).eps
    assert (logits.float() - expected).norm() <= tolerance * expected.norm()


def test_weights_packed_for_evaluation_on_a_cpu_are_unpacked() -> None:
    """bitsandbytes packs them in another way in the first evaluation on CPUs with AVX512-BF16."""
    model = in_4bit(plain("llama"))
    expected = copy.deepcopy(model)
    for module in model.modules():
        if is_4bit(module):
            packed = bnb.functional._convert_weight_packed_for_cpu(module.weight.data, module.weight.quant_state)
            module.weight.data, module.weight.quant_state = packed
            assert module.weight.quant_state.packing_format_for_cpu
    patch_model(model, CONFIG)
    patch_model(expected, CONFIG)
    for mlp, wanted in zip(sparse_mlps(model), sparse_mlps(expected), strict=True):
        for found, other in zip(mlp.projections, wanted.projections, strict=True):
            tolerance = torch.finfo(torch.bfloat16).eps * other.rows().abs().amax()  # it rounds the scales
            assert (found.rows() - other.rows()).abs().amax() <= tolerance
