"""What a fitted index costs and keeps: the tokens that it scores, and what resuming restores."""

from pathlib import Path

import pytest
import torch
from helpers.mlps import patched
from helpers.models import CONFIG, fill_updates, opt

from hf_subquad import load_sidecar, patch_model, save_sidecar, sparse_mlps


@pytest.mark.parametrize(
    ("kind", "d", "m", "rank", "size", "scored"),
    [
        # by hand, in products a token: rank (d + inputs) to score, d (inputs + m) for half of the neurons and back
        ("plain", 128, 512, 1, 64, 64),  # 640 of 131072: all
        ("plain", 128, 512, 32, 64, 20),  # 20480: 5% of the products are 20.48 of 64
        ("gated", 128, 512, 32, 64, 17),  # 36864 of 196608: 17.07
        ("plain", 32, 128, 32, 64, 16),  # 5120 of 8192: the least
        ("plain", 32, 128, 32, 12, 12),
    ],
)
def test_as_many_tokens_are_scored_as_a_twentieth_of_the_products_pays(
    kind, d: int, m: int, rank: int, size: int, scored: int
) -> None:
    index = patched(kind, d, m, dtype=torch.float32, sketch_rank=rank)[1].index
    assert index.scored_tokens(size) == scored


def test_scored_tokens_are_spread_over_the_tile() -> None:
    few, all_ = (patched("plain", 64, 256, dtype=torch.float32, sketch_rank=rank)[1].index for rank in (64, 1))
    assert (few.scored_tokens(64), all_.scored_tokens(64)) == (16, 64)
    tile = torch.arange(64).view(1, 64, 1).expand(2, 64, 64).float()
    assert few._sampled(tile)[0, :, 0].tolist() == list(range(0, 64, 4))
    assert all_._sampled(tile) is not tile and torch.equal(all_._sampled(tile), tile)


def test_a_neuron_that_one_token_needs_is_found_where_all_are_scored() -> None:
    """Token 1 is in no sample of every fourth."""
    index = patched("plain", 64, 256, dtype=torch.float32, sketch_rank=1)[1].index
    tile = torch.zeros(1, 64, 64)
    tile[0, 1] = 100 * index.sketch.basis[0] / index.sketch.basis[0].norm()
    alone = index.tile_scores(tile[:, 1:2]).topk(8).indices.sort().values
    assert torch.equal(index.choose(tile, 8).sort().values, alone)
    assert not torch.equal(index.tile_scores(tile[:, ::4]).topk(8).indices.sort().values, alone)


def test_resuming_restores_the_fit(tmp_path: Path) -> None:
    saved = patch_model(opt(), CONFIG)
    generator = torch.Generator().manual_seed(0)
    for mlp in sparse_mlps(saved):
        mlp.index.fit(torch.randn(90, mlp.index.sketch.basis.shape[1], generator=generator).cumsum(1))
    fill_updates(saved)
    save_sidecar(saved, tmp_path, 4)
    model = patch_model(opt(), CONFIG)
    model.load_state_dict(saved.state_dict())
    assert load_sidecar(model, tmp_path) == 4
    for mine, theirs in zip(sparse_mlps(model), sparse_mlps(saved), strict=True):
        assert torch.equal(mine.index.summary, theirs.index.summary)
        found, expected = (mlp.index.sketch.codes @ mlp.index.sketch.basis for mlp in (mine, theirs))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # W + U V - U V is rounded
    plain = patch_model(opt(), CONFIG)
    save_sidecar(plain, tmp_path, 5)
    model.load_state_dict(plain.state_dict())
    load_sidecar(model, tmp_path)
    for mine, theirs in zip(sparse_mlps(model), sparse_mlps(plain), strict=True):
        assert mine.index.summary is None and torch.equal(mine.index.sketch.codes, theirs.index.sketch.codes)
