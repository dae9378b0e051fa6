"""Does attention by sequence equal PyTorch's, is anything else left to PyTorch, and is a model as before afterwards?"""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import CONFIG, build, llama, tokens
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_subquad import SubquadConfig, patch_head, patch_model, unpatch_model
from hf_subquad.layers.attention_patch import restore_attention, stock_attention, uses_sequence_attention
from hf_subquad.layers.patched_mlps import runtime_of
from hf_subquad.ops import attention
from hf_subquad.ops.attention import segments_of, sequence_attention

SIZE, HEADS, GROUPS, WIDTH = 9, 4, 2, 8
EXACT = SubquadConfig(**{**CONFIG.to_dict(), "active": 1.0, "layers_to_transform": "all"})


def attention_module(groups: int = 1, skips: bool = True) -> nn.Module:
    module = nn.Module()
    vars(module).update({"num_key_value_groups": groups, **({attention.MAY_SKIP: True} if skips else {})})
    return module


def mask_of(sequences: list[list[int]], causal: bool) -> Tensor:
    """bool [B, 1, S, S] from a sequence number for each token; 0: padding."""
    numbers = torch.tensor(sequences)
    same = (numbers.unsqueeze(1) == numbers.unsqueeze(2)) & (numbers.unsqueeze(1) > 0)
    return (same.tril() if causal else same).unsqueeze(1)


RIGHT = [[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8]
LEFT = [row[::-1] for row in RIGHT]
PACKED = [[1] * 3 + [2] * 2 + [3] * 4, [1] * 5 + [2] * 3 + [0], [1] * 9]
MIXED = [[0, 1, 1, 0, 2, 2, 2, 0, 0], [0] * 9, [1] * 4 + [2] * 5]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("sequences", [RIGHT, LEFT, PACKED, MIXED], ids=["right", "left", "packed", "mixed"])
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_outputs_and_gradients_equal_pytorchs(sequences: list[list[int]], causal: bool, scaling: float | None) -> None:
    mask = mask_of(sequences, causal)
    real = torch.tensor(sequences) > 0
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(3, SIZE, heads, WIDTH, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    )
    upstream = torch.randn(3, SIZE, HEADS, WIDTH, generator=generator, dtype=torch.float64) * real[..., None, None]
    module = attention_module(HEADS // GROUPS)
    ours, nothing = sequence_attention(module, q, k, v, mask, scaling=scaling)
    stock, _ = sdpa_attention_forward(module, q, k, v, mask | ~real[:, None, :, None], scaling=scaling)
    assert nothing is None and ours.shape == stock.shape and ours.is_contiguous()
    assert not causal or not ours[~real].any()
    eps = 64 * SIZE * torch.finfo(torch.float64).eps
    torch.testing.assert_close(ours[real], stock[real], rtol=eps, atol=eps)
    wanted = torch.autograd.grad(stock, (q, k, v), upstream)
    torch.testing.assert_close(torch.autograd.grad(ours, (q, k, v), upstream), wanted, rtol=eps, atol=eps)


@pytest.mark.parametrize("lengths", [[9, 4, 2], [1, 1, 1]])
@pytest.mark.parametrize("expanded", [True, False])
def test_queries_of_another_text_get_their_outputs_too(lengths: list[int], expanded: bool) -> None:
    """Cross-attention, where the source is as wide as the target."""
    keys = torch.arange(SIZE) < torch.tensor(lengths)[:, None, None, None]
    mask = keys.expand(-1, -1, SIZE, -1) if expanded else keys
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(3, HEADS, SIZE, WIDTH, generator=generator, dtype=torch.float64) for _ in range(3))
    module = attention_module()
    eps = 64 * SIZE * torch.finfo(torch.float64).eps
    ours, stock = sequence_attention(module, q, k, v, mask)[0], sdpa_attention_forward(module, q, k, v, mask)[0]
    torch.testing.assert_close(ours, stock, rtol=eps, atol=eps)


def test_a_mask_may_be_filled_again() -> None:
    mask, other = mask_of(RIGHT, causal=True).clone(), mask_of(PACKED, causal=True)
    q = torch.randn(3, HEADS, SIZE, WIDTH, dtype=torch.float64)
    sequence_attention(attention_module(), q, q, q, mask)
    mask.copy_(other)
    ours, fresh = (sequence_attention(attention_module(), q, q, q, each)[0] for each in (mask, other))
    assert torch.equal(ours, fresh)


def test_sequences_are_found() -> None:
    found = segments_of(mask_of(MIXED, causal=True))
    assert found is not None and found.causal
    assert found.spans == [[(1, 3), (4, 7)], [], [(0, 4), (4, 9)]]
    keys = torch.tensor(RIGHT)[:, None, None] > 0  # as encoders may have it, the same for all queries
    found = segments_of(keys)
    assert found is not None and not found.causal and found.spans == [[(0, 9)], [(0, 4)], [(0, 1)]]


def changed(mask: Tensor, row: int, query: int, key: int) -> Tensor:
    mask = mask.clone()
    mask[row, 0, query, key] ^= True
    return mask


WINDOW = torch.ones(1, 1, SIZE, SIZE, dtype=torch.bool).tril() & torch.ones(SIZE, SIZE, dtype=torch.bool).triu(-3)
OTHERS = {
    "sliding_window": WINDOW,
    "sees_one_more": changed(mask_of(RIGHT, True), 0, 2, 5),
    "sees_one_less": changed(mask_of(RIGHT, True), 0, 5, 2),
    "hole": mask_of(RIGHT, True) & (torch.arange(SIZE) != 2),
    "prefix": changed(mask_of([[1] * 9], True), 0, 0, 1),
    "first_sees_all": mask_of([[1] * 9], True) | (torch.arange(SIZE)[:, None] == 0),
    "cross": torch.ones(2, 1, 4, 7, dtype=torch.bool),
    "by_head": mask_of(RIGHT, True).expand(-1, HEADS, -1, -1),
    "added": mask_of(RIGHT, True).float(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_are_left_to_pytorch(name: str) -> None:
    assert segments_of(OTHERS[name]) is None


def test_what_saves_little_or_changes_scores_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    stock: list[bool] = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *_, **__: stock.append(True) or (None, None))
    q = torch.randn(3, HEADS, SIZE, WIDTH)
    full = mask_of([[1] * 9, [1] * 9, [1] * 8 + [0]], causal=True)
    padded = mask_of(RIGHT, causal=True)
    for mask, given in (
        (None, {}), (full, {}), (padded, {"dropout": 0.1}), (padded, {"position_bias": torch.zeros(1)}),
    ):  # fmt: skip
        sequence_attention(attention_module(), q, q, q, mask, **given)
    sequence_attention(attention_module(), q[:, :, -1:], q, q, padded[:, :, -1:])
    sequence_attention(attention_module(skips=False), q, q, q, padded)
    assert len(stock) == 6
    sequence_attention(attention_module(), q, q, q, padded, position_bias=None)
    assert len(stock) == 6


def padded_batch(side: str) -> dict[str, Tensor]:
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, 4:], mask[1, 8:] = 0, 0
    ids = tokens(0, (3, 11))
    if side == "left":
        mask = mask.flip(1)
    first = mask.cumsum(1) == 1  # which padding before it would predict
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((mask == 0) | first, -100)}


def step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    loss = model(**batch).loss
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(loss, trained, allow_unused=True)
    return loss, torch.cat([grad.flatten() for grad in grads if grad is not None])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_a_patched_model_attends_by_sequence_and_learns_the_same(family: str, side: str) -> None:
    batch = padded_batch(side)
    model = patch_model(build(family, torch.float64), EXACT)
    step(model, batch)  # in which it finds out that it can
    assert runtime_of(model).padding.may_skip and model.config._attn_implementation == "subquad_sdpa"
    loss, gradient = step(model, batch)
    with stock_attention(model):
        assert model.config._attn_implementation == "sdpa"
        stock_loss, stock_gradient = step(model, batch)
    eps = 1e4 * torch.finfo(torch.float64).eps  # some thousand terms in a gradient
    torch.testing.assert_close(loss, stock_loss, rtol=eps, atol=eps)
    torch.testing.assert_close(gradient, stock_gradient, rtol=eps, atol=eps * stock_gradient.abs().amax().item())


def test_sources_as_wide_as_their_targets() -> None:
    """An encoder-decoder whose first batch is padded otherwise than its second."""
    model = build("bart", torch.float64)
    expected = copy.deepcopy(model)
    patch_model(model, EXACT)
    for lengths, targets in (([6, 12, 9], [5, 7, 4]), ([6, 5, 12], [11, 12, 9])):
        mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
        ids, labels = tokens(0, (3, 12)), tokens(1, (3, max(targets)))
        labels[torch.arange(max(targets)) >= torch.tensor(targets)[:, None]] = -100
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        loss, stock = model(**batch).loss, expected(**batch).loss
        torch.testing.assert_close(loss, stock, rtol=1e-12, atol=0)
    assert runtime_of(model).padding.may_skip


def test_targets_padded_as_their_sources() -> None:
    """A batch whose labels have the shape of its tokens, with the head at labelled positions only."""
    model = build("t5", torch.float64)
    expected = copy.deepcopy(model)
    patch_head(patch_model(model, EXACT))
    ids = tokens(0, (3, 12))
    mask = (torch.arange(12) < torch.tensor([6, 12, 9])[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    for _ in range(2):
        torch.testing.assert_close(model(**batch).loss, expected(**batch).loss, rtol=1e-6, atol=0)  # the head's float32


def test_it_goes_with_copies_and_ends_with_the_patch() -> None:
    model, batch = patch_model(llama(), EXACT), padded_batch("right")
    step(model, batch)
    assert "subquad" not in model.config.to_json_string()
    step(copy.deepcopy(model), batch)
    unpatch_model(model)
    assert model.config._attn_implementation == "sdpa"


def test_models_that_share_a_config() -> None:
    """One is patched, and attends by sequence; the other does not until it is patched, too."""
    first, batch = patch_model(llama(), EXACT), padded_batch("right")
    step(first, batch)
    second = type(first)(first.config)
    assert second.config is first.config and first.config._attn_implementation == "subquad_sdpa"
    found = second(**batch).logits
    with stock_attention(first):
        assert torch.equal(found, second(**batch).logits)  # at padding, too
    assert not restore_attention(second)
    assert uses_sequence_attention(first) and not uses_sequence_attention(second)
    step(patch_model(second, EXACT), batch)
    assert uses_sequence_attention(first) and uses_sequence_attention(second)


def test_a_loss_of_ones_own_gets_padding_as_it_was() -> None:
    """A Trainer with `compute_loss_func` plans on batches with labels, and trains on the same without."""
    model, batch = patch_model(llama(), EXACT), padded_batch("right")
    step(model, batch)
    assert model.config._attn_implementation == "subquad_sdpa"
    del batch["labels"]
    found = model(**batch).logits
    torch.testing.assert_close(found, llama()(**batch).logits, rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_an_unpickled_model_finds_it_in_another_process(tmp_path: Path) -> None:
    model, batch = patch_model(llama(), EXACT), padded_batch("right")
    step(model, batch)
    assert model.config._attn_implementation == "subquad_sdpa"
    torch.save((model, batch, model(**batch).loss.item()), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, batch, loss = torch.load(sys.argv[1], weights_only=False)\n"
        "assert abs(model(**batch).loss.item() / loss - 1) < 1e-5"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], check=True)


def test_models_without_padding_or_sdpa_keep_theirs() -> None:
    model = patch_model(llama(), EXACT)
    step(model, {"input_ids": tokens(0, (3, 11)), "labels": tokens(0, (3, 11))})
    assert model.config._attn_implementation == "sdpa"
    model = llama()
    model.set_attn_implementation("eager")
    step(patch_model(model, EXACT), padded_batch("right"))
    assert model.config._attn_implementation == "eager"


def test_a_model_that_looks_at_the_name_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(llama(), EXACT)
    stock = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = stock(self, *args, **kwargs)
        outputs.loss = outputs.loss * (1 if self.config._attn_implementation == "sdpa" else 2)
        return outputs

    monkeypatch.setattr(type(model), "forward", forward)
    step(model, padded_batch("right"))
    assert runtime_of(model).padding.may_skip and model.config._attn_implementation == "sdpa"
