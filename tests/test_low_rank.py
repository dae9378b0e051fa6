"""Does the trainable update start at nothing, restart, report its size, and merge exactly?"""

import math

import pytest
import torch
from torch import Tensor

from hf_subquad.weights.low_rank import LowRankUpdate


def update(zero: str = "U", scale: float = 1.5, dtype: torch.dtype = torch.float32, seed: int = 7) -> LowRankUpdate:
    return LowRankUpdate(13, 9, 4, scale, zero, seed, like=torch.zeros(1, dtype=dtype))


def filled(**settings: object) -> tuple[LowRankUpdate, Tensor]:
    """An update with random factors, and scale * U V by hand."""
    made = update(**settings)
    with torch.no_grad():
        made.U.normal_()
        made.V.normal_()
    return made, made.scale * (made.U @ made.V).detach()


@pytest.mark.parametrize(("zero", "drawn", "fan_in"), [("U", "V", 9), ("V", "U", 13)])
def test_starts_at_zero_with_one_random_factor(zero: str, drawn: str, fan_in: int) -> None:
    made = update(zero)
    assert (made.U.shape, made.V.shape) == ((13, 4), (4, 9))
    assert made.is_zero() and not getattr(made, zero).any()
    values = getattr(made, drawn)
    assert values.abs().max() <= 1 / math.sqrt(fan_in)
    assert values.std() > 0.4 / math.sqrt(fan_in)
    assert made.norm_squared() == 0


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_factors_are_at_least_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    made = update(dtype=dtype)
    assert made.U.dtype == made.V.dtype == expected


def test_factors_stay_float32_when_the_model_is_cast() -> None:
    made = update().to(torch.bfloat16)
    assert made.U.dtype == made.V.dtype == torch.float32
    assert update().double().U.dtype == torch.float64


def test_each_restart_draws_anew_and_repeatably() -> None:
    state = torch.get_rng_state()
    first, second = update(), update()
    draws = [first.V.clone()]
    for _ in range(3):
        with torch.no_grad():
            first.U.normal_(generator=torch.Generator().manual_seed(0))
        first.restart()
        second.restart()
        assert first.is_zero()
        assert torch.equal(first.V, second.V)
        draws.append(first.V.clone())
    assert first.restarts == 3
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert not torch.equal(update(seed=8).V, draws[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_norm_squared(scale: float) -> None:
    made, whole = filled(scale=scale)
    torch.testing.assert_close(made.norm_squared(), whole.square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_added_to(sign: int) -> None:
    made, whole = filled()
    rows = torch.randn(13, 9)
    torch.testing.assert_close(made.added_to(rows, sign), rows + sign * whole, rtol=1e-6, atol=1e-6)


def test_added_to_accumulates_in_float32() -> None:
    """The sum is rounded to bfloat16 once: the result is the bfloat16 value nearest to it."""
    made, whole = filled(dtype=torch.bfloat16)
    rows = torch.randn(13, 9).to(torch.bfloat16)
    assert torch.equal(made.added_to(rows), (rows.float() + whole).to(torch.bfloat16))
    assert not torch.equal(made.added_to(rows), rows + whole.to(torch.bfloat16))


def test_zero_update_adds_nothing_at_all() -> None:
    rows = torch.tensor([[-0.0] * 9] * 13)
    added = update().added_to(rows)
    assert torch.equal(torch.signbit(added), torch.signbit(rows))


def test_factors_scale_v() -> None:
    made, _ = filled()
    u, v = made.factors()
    assert torch.equal(u, made.U)
    torch.testing.assert_close(v, 1.5 * made.V)


def test_saves_and_loads_nothing() -> None:
    made, whole = filled()
    assert list(made.state_dict()) == []
    made.load_state_dict({}, strict=True)
    torch.testing.assert_close(made.scale * made.U @ made.V, whole)
