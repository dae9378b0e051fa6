"""Does the configuration refuse what is wrong, by name and value, and survive a round trip?"""

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_subquad import ConfigError, SubquadConfig, SubquadError

WRONG: list[tuple[str, Any]] = [
    *((name, value) for name in ("rank", "tile_size", "sketch_rank") for value in (0, -1, 2.0, True, "3", None)),
    *(
        (name, value)
        for name in ("seed", "fold_steps", "refresh_steps", "head_megabytes")
        for value in (-1, 1.0, False, math.nan)
    ),
    ("seed", 2**63),
    *(("alpha", value) for value in (0, -1.0, math.nan, math.inf, 1e39, 10**400, "1", None, True)),
    *(("tolerance", value) for value in (0, -1.0, math.nan, "1", None, True)),
    *(("dense_share", value) for value in (-0.1, 1.1, math.nan, "1", None, True)),
    *(("active", value) for value in (0, -3, 0.0, 1.0001, -0.5, math.nan, True, "half")),
    *((name, value) for name in ("tile_order", "backend") for value in ("random", None, 1)),
    *(("layers_to_transform", value) for value in ("first", [], [-1], [1.0], [True], (1, 2), 3, None, ["1"])),
    *((name, value) for name in ("target_modules", "exclude_modules") for value in ([], "fc1", [1], [""], ("fc1",))),
    *(("sparse_eval", value) for value in (1, "yes", None)),
    *(("index_factory", value) for value in ("", None, 4)),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda part: str(part)[:20])
def test_out_of_range_names_field_and_value(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        SubquadConfig(**{name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, SubquadError)


def test_every_field_has_a_wrong_value_above() -> None:
    assert {name for name, _ in WRONG} == {f.name for f in dataclasses.fields(SubquadConfig)}


def test_every_field_explains_itself_and_there_are_few() -> None:
    fields = dataclasses.fields(SubquadConfig)
    assert len(fields) <= 18
    assert all(len(f.metadata["help"]) > 10 for f in fields)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"active": 7},
        {"active": 1},
        {"active": 1.0},
        {"active": 0.25, "alpha": 3, "layers_to_transform": [0, 2], "target_modules": ["fc1", "fc2"]},
        {"exclude_modules": ["vision_tower", "layers.3"]},
        {"tile_order": "consecutive", "sparse_eval": True, "index_factory": "IVF4,Flat", "seed": 2**31},
    ],
)
def test_json_round_trip(values: dict[str, Any]) -> None:
    config = SubquadConfig(**values)
    again = SubquadConfig.from_json(config.to_json())
    assert again == config
    assert type(again.active) is type(config.active)
    assert SubquadConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert set(config.to_dict()) == {f.name for f in dataclasses.fields(SubquadConfig)}


POSITIVE, COUNTS = st.floats(1e-30, 1e30), st.integers(1, 10**9)
CONFIGS = st.builds(
    SubquadConfig, rank=COUNTS, alpha=POSITIVE | COUNTS, active=st.none() | COUNTS | st.floats(1e-9, 1),
    tolerance=POSITIVE, tile_size=COUNTS, tile_order=st.sampled_from(["similar", "consecutive"]),
    layers_to_transform=st.sampled_from(["all", "all_but_first"]) | st.lists(st.integers(0, 99), min_size=1),
    target_modules=st.none() | st.lists(st.text(min_size=1), min_size=1),
    exclude_modules=st.none() | st.lists(st.text(min_size=1), min_size=1), sketch_rank=COUNTS,
    seed=st.integers(0, 2**63 - 1), fold_steps=st.integers(0, 10**9), refresh_steps=st.integers(0, 10**9),
    dense_share=st.floats(0, 1), sparse_eval=st.booleans(), index_factory=st.text(min_size=1),
)  # fmt: skip


@settings(max_examples=50, deadline=None, derandomize=True)
@given(CONFIGS, st.integers(1, 10**6))
def test_any_config_survives_json_and_gives_possible_budgets(config: SubquadConfig, neurons: int) -> None:
    assert SubquadConfig.from_json(config.to_json()) == config
    if type(config.active) is int and config.active > neurons:
        with pytest.raises(ConfigError):
            config.active_neurons(neurons)
    else:
        assert 1 <= config.active_neurons(neurons) <= neurons
    assert 0 < config.scale < math.inf


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"ranks.*rank"):
        SubquadConfig.from_dict({"ranks": 3})


@pytest.mark.parametrize("text", ["[1]", "3", "null", '"rank"', "{", "", "[" * 100_000], ids=lambda text: text[:9])
def test_json_that_is_not_an_object_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        SubquadConfig.from_json(text)


def test_values_from_json_are_checked() -> None:
    with pytest.raises(ConfigError, match="rank"):
        SubquadConfig.from_json('{"rank": 0}')


@pytest.mark.parametrize(
    ("active", "neurons", "expected"),
    [
        (None, 8192, 1352),  # ceil(8192 ** 0.8): 8192 = 2 ** 13, 2 ** 10.4 = 1351.2
        (None, 32, 16),  # 2 ** 4 exactly
        (None, 1, 1),
        (1, 50, 1),
        (1.0, 50, 50),
        (50, 50, 50),
        (0.5, 51, 26),
        (0.001, 51, 1),
    ],
)
def test_active_neurons(active: float | int | None, neurons: int, expected: int) -> None:
    assert SubquadConfig(active=active).active_neurons(neurons) == expected


def test_more_active_than_there_are() -> None:
    with pytest.raises(ConfigError, match=r"active=51.*50"):
        SubquadConfig(active=51).active_neurons(50)


def test_scale_is_alpha_over_rank() -> None:
    assert SubquadConfig(rank=4, alpha=6).scale == 1.5


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SubquadConfig().rank = 3  # type: ignore[misc]
