"""Is the wide net the stated function, at the stated scale, and a well-behaved module?"""

import copy

import pytest
import torch
from torch import Tensor

from hf_subquad import ConfigError
from hf_subquad.theory import GaussNewton, WideNet
from hf_subquad.theory.network import gain, threshold

F64 = torch.float64


def unit(samples: int, width: int, dtype: torch.dtype = F64) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(samples, width, generator=draw, dtype=dtype))


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_forward_is_the_formula(depth: int) -> None:
    network = WideNet(3, 60, depth, outputs=2, seed=4, dtype=F64)
    x = unit(5, 3)
    h = x
    for weight in [*network.lower, network.trained.weight]:
        shift = network.shift_per_length * h.norm(dim=1, keepdim=True)
        h = network.gain * torch.relu(h @ weight - shift)
    torch.testing.assert_close(network(x), h @ network.output.t())
    assert len(network.lower) == depth - 1


def test_gain_is_the_second_moment_of_a_shifted_relu() -> None:
    g = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0), dtype=F64)
    for c in (0.0, 1.0, 1.7):
        moment = (g - c).clamp(min=0).square()
        assert 2 * gain(c) ** 2 * moment.mean() == pytest.approx(1, abs=0.02)
    assert gain(0.0) == pytest.approx(1)


@pytest.mark.parametrize("width", [512, 2048])
def test_lengths_predictions_and_fired_shares_do_not_depend_on_width_and_depth(width: int) -> None:
    x = unit(64, 16, torch.float32)
    with torch.no_grad():
        for depth in (2, 3):
            network = WideNet(16, width, depth)
            h = network.features(x)
            assert h.norm(dim=1).mean() == pytest.approx(1, abs=0.25)
            assert 0.2 < network(x).square().mean() < 4
            fired = network.trained.apply_to(h) > network.shift(h)
            assert fired.float().mean(1).max() <= width**-0.2


def test_threshold_bounds_the_expected_share_by_the_fifth_root() -> None:
    for width in (2, 1024, 2**20):
        tail = 0.5 * torch.erfc(torch.tensor(threshold(width) / 2**0.5)).item()
        assert tail <= width**-0.2


def test_zero_start_is_zero_and_trains() -> None:
    network = WideNet(4, 512, zero_start=True, dtype=F64)
    x = unit(6, 4)
    assert network(x).abs().max() < 1e-12
    optimizer = GaussNewton(network, x, torch.arange(6, dtype=F64)[:, None] - 3)
    for _ in range(5):
        optimizer.step()
    assert optimizer.loss() < 1e-9


def test_equal_seeds_draw_equal_networks_and_leave_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    one, two, other = WideNet(3, 20, seed=1), WideNet(3, 20, seed=1), WideNet(3, 20, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(one.parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_state_dict_is_plain_and_holds_what_was_learned() -> None:
    network, x = WideNet(4, 64, depth=3, dtype=F64), unit(6, 4)
    optimizer = GaussNewton(network, x, torch.ones(6, 1, dtype=F64))
    optimizer.step()
    assert network.trained.pending_rank == 6
    expected = network(x)
    twin = copy.deepcopy(network)
    torch.testing.assert_close(twin(x), expected)
    state = network.state_dict()
    assert list(state) == ["output", "lower.0", "lower.1", "trained.weight"]
    loaded = WideNet(4, 64, depth=3, seed=9, dtype=F64)
    loaded.load_state_dict(state)
    torch.testing.assert_close(loaded(x), expected)
    optimizer.step()  # goes on after the save
    torch.testing.assert_close(network(x), optimizer.state.predictions())
    assert not torch.allclose(twin(x), network(x), rtol=0, atol=1e-12)


def test_plain_optimizers_can_train_the_matrix() -> None:
    network, x = WideNet(4, 256, dtype=F64), unit(6, 4)
    y = torch.ones(6, 1, dtype=F64)
    assert [name for name, p in network.named_parameters() if p.requires_grad] == ["trained.weight"]
    gradient = torch.autograd.grad((network(x) - y).square().sum() / 2, network.trained.weight)[0]
    state = GaussNewton(network, x, y).state
    torch.testing.assert_close(gradient, state.features.t() @ state.direction(state.predictions() - y))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"in_features": 0}, "in_features"), ({"width": 1}, "width"), ({"depth": 1}, "depth"), ({"outputs": 0}, "outputs"),
     ({"width": 65, "zero_start": True}, "even width"), ({"dtype": torch.bfloat16}, "dtype"),
     ({"rank_budget": 0}, "rank_budget")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WideNet(**{"in_features": 3, "width": 64, **settings})
