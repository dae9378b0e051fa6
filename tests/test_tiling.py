"""Do tiles hold every token once, resemble each other, and survive degenerate features?"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_subquad.ops.group_tokens import TokenTiles, make_tiles, tile_shape

ORDERS = ("similar", "consecutive")


def features(count: int, seed: int = 0, width: int = 3) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def check_partition(tiles: TokenTiles, tokens: int) -> None:
    count, size = tiles.shape
    flat, slots = tiles.entries.flatten(), tiles.slots.flatten()
    assert torch.equal(flat.sort().values, torch.arange(count * size))
    assert torch.equal(tiles.position.sort().values, flat.lt(tokens).nonzero().squeeze(1))
    assert torch.equal(slots[tiles.position], torch.arange(tokens))
    assert len(tiles.spare) == count * size - tokens
    assert not set(tiles.spare.tolist()) & set(tiles.position.tolist())
    assert slots.min() >= 0 and slots.max() < tokens


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tile_size", [1, 5, 16, 128])
def test_every_token_exactly_once(order: str, tile_size: int) -> None:
    checked = 0
    for tokens in range(1, 301, 1 if tile_size == 16 else 7):
        tiles = make_tiles(features(tokens), tile_size, order)
        assert tiles.shape == tile_shape(tokens, tile_size)
        check_partition(tiles, tokens)
        checked += 1
    assert checked >= 43


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 400), st.integers(1, 500), st.sampled_from(ORDERS), st.integers(1, 4), st.integers(1, 1000))
def test_every_token_exactly_once_whatever_the_ties(
    tokens: int, tile_size: int, order: str, width: int, distinct: int
) -> None:
    """With few distinct features most tokens cannot be told apart."""
    values = (features(tokens, width=width) * distinct).round() / distinct
    check_partition(make_tiles(values, tile_size, order), tokens)


def test_sizes() -> None:
    for tokens in range(1, 301):
        for tile_size in (1, 2, 5, 16, 64, 128):
            count, size = tile_shape(tokens, tile_size)
            assert tile_size == 1 or count & (count - 1) == 0
            assert 0 <= count * size - tokens < count  # less than one spare slot a tile
            if tokens >= tile_size:
                assert tile_size / math.sqrt(2) - 1 <= size <= tile_size * math.sqrt(2) + 1, (tokens, tile_size, size)
            else:
                assert (count, size) == (1, tokens) or size >= tile_size / math.sqrt(2) - 1


def test_slots_and_tokens() -> None:
    tiles = make_tiles(features(13), 4, "similar")
    values = features(13, seed=1, width=4)
    by_slot = tiles.to_slots(values)
    assert len(tiles.spare)
    assert torch.equal(tiles.to_tokens(by_slot), values)
    flat = by_slot.view(-1, 4)
    assert not flat[tiles.spare].any()
    assert torch.equal(flat[tiles.position], values)
    by_slot[0, 0] += 1
    assert not torch.equal(tiles.to_tokens(by_slot), values) or 0 in tiles.spare


def test_consecutive_keeps_the_order() -> None:
    tiles = make_tiles(features(21), 5, "consecutive")
    assert torch.equal(tiles.entries.flatten(), torch.arange(24))
    assert torch.equal(tiles.slots.flatten(), torch.arange(24) % 21)


@pytest.mark.parametrize("seed", range(5))
def test_similar_recovers_planted_clusters(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    clusters, each = 4, 16
    centres = 10 * torch.randn(clusters, 6, generator=generator)
    label = torch.arange(clusters).repeat_interleave(each)[torch.randperm(clusters * each, generator=generator)]
    values = centres[label] + 0.1 * torch.randn(len(label), 6, generator=generator)
    similar = label[make_tiles(values, each, "similar").slots]
    assert (similar == similar[:, :1]).all()
    mixed = label[make_tiles(values, each, "consecutive").slots]
    assert (mixed != mixed[:, :1]).any()


def test_similar_tiles_are_tighter() -> None:
    values = features(256, width=4)

    def spread(order: str) -> float:
        groups = values[make_tiles(values, 16, order).slots]
        return (groups - groups.mean(1, keepdim=True)).square().sum().item()

    assert spread("similar") < 0.6 * spread("consecutive")


def test_scale_of_features_does_not_matter() -> None:
    values = features(64)
    expected = make_tiles(values, 8, "similar").entries
    for factor in (2.0**-40, 2.0**40):
        assert torch.equal(make_tiles(values * factor, 8, "similar").entries, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_deterministic_and_without_global_randomness(order: str) -> None:
    state = torch.get_rng_state()
    first, second = (make_tiles(features(77), 8, order) for _ in range(2))
    assert torch.equal(first.entries, second.entries)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(37, 3),
        torch.ones(37, 3),
        torch.full((37, 3), float("nan")),
        torch.full((37, 3), float("inf")),
        features(37).index_fill(0, torch.tensor([4, 9]), float("nan")),
        features(37) * 1e30,
        features(37) * 1e-38,
        features(37)[:, :1],
        torch.zeros(37, 3).index_fill(0, torch.tensor([5]), 1.0),
    ],
    ids=["zeros", "equal", "nan", "inf", "some nan", "huge", "tiny", "one feature", "one outlier"],
)
def test_degenerate_features_still_give_a_partition(values: torch.Tensor) -> None:
    check_partition(make_tiles(values, 4, "similar"), 37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    check_partition(make_tiles(features(37).to(dtype), 4, "similar"), 37)
