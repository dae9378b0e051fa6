"""Does the index find the neurons that matter, report half-spaces exactly, and stay current?"""

import copy
import warnings

import pytest
import torch
from helpers.mlps import KINDS, Kind, patched
from helpers.models import CONFIG, assert_same, opt, snapshot, tokens, trained
from torch import Tensor

from hf_subquad import CalibrationError, ConfigError, SubquadConfig, WeightsError, patch_model, sparse_mlps, sync_model
from hf_subquad.config import TileOrder
from hf_subquad.index import choose_neurons as index_module
from hf_subquad.index.choose_neurons import ActivationIndex
from hf_subquad.index.half_space import Report, ReportingIndex
from hf_subquad.index.selection_quality import evaluate_selection, outputs

D, M, N = 12, 40, 21


def made(kind: Kind = "plain", **settings: object) -> ActivationIndex:
    """An index that has seen the live updates of its output projection."""
    index = patched(kind, D, M, dtype=torch.float32, **settings)[1].index
    index.refresh()
    return index


def inputs(count: int = N, d: int = D) -> Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(4))


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def recall(index: ActivationIndex, x: Tensor, k: int, tile_size: int, order: TileOrder = "similar") -> float:
    """Share of the truly most important k neurons of each tile of x [N, d] that `select` finds."""
    selection = index.select(x, k, tile_size, order)
    return evaluate_selection(index, x[selection.tiles.slots], selection.neurons).recall


def check_report(report: Report, scores: Tensor, threshold: float) -> None:
    """Entry by entry against all scores [N, m]."""
    assert report.starts.tolist()[0] == 0 and report.starts[-1] == len(report.neurons) == len(report.values)
    assert len(report.starts) == len(scores) + 1
    for token, row in enumerate(scores):
        assert report.of(token).tolist() == (row >= threshold).nonzero().flatten().tolist()
    rows = torch.repeat_interleave(report.starts.diff())
    torch.testing.assert_close(report.values, scores[rows, report.neurons], rtol=1e-4, atol=1e-4)


# What neurons add


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_all_neurons_in_parts_are_the_whole(kind: Kind) -> None:
    """In any order, with live updates, without the output's bias; some part may be empty."""
    index = made(kind)
    tile_tokens = inputs(20).view(4, 5, D)
    neurons = torch.stack([torch.randperm(M, generator=torch.Generator().manual_seed(t)) for t in range(4)])
    parts = [outputs(index, tile_tokens, part) for part in neurons.tensor_split([7, 7, 30], 1)]
    assert not parts[1].any() and all(part.any() for part in (parts[0], *parts[2:]))
    found = evaluate_selection(index, tile_tokens, neurons[:, :7])
    torch.testing.assert_close(sum(parts), found.whole.flatten(0, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts[2] + parts[3], found.missed.flatten(0, 1), rtol=1e-4, atol=1e-5)


# Half-space reporting


@pytest.mark.parametrize("threshold", [-5.0, 0.0, 3.0, 4.0])
def test_flat_equals_brute_force_with_ties(threshold: float) -> None:
    """Integers: every product is exact, and many equal the threshold."""
    rows, queries = integers(M, 5), integers(N, 5, seed=1)
    scores = queries @ rows.t()
    assert (scores == threshold).sum() > 5
    check_report(ReportingIndex(rows, "Flat").report(queries, threshold), scores, threshold)


@pytest.mark.parametrize(
    ("queries", "threshold", "entries"),
    [(inputs(), 1e6, 0), (inputs(), -1e6, N * M), (inputs(0), 0.0, 0), (torch.zeros(N, D), 0.0, N * M)],
    ids=["none", "all", "no tokens", "all at the threshold"],
)
def test_extreme_reports(queries: Tensor, threshold: float, entries: int) -> None:
    report = ReportingIndex(torch.randn(M, D), "Flat").report(queries, threshold)
    assert len(report.neurons) == entries
    assert len(report.starts) == len(queries) + 1


@pytest.mark.parametrize("kind", KINDS)
def test_report_of_an_mlp_equals_brute_force(kind: Kind) -> None:
    """With a full-rank sketch the reported pre-activation is the true one, update and bias included."""
    index = made(kind)
    x, gate = inputs(), index.inputs[0]
    pre = x @ gate.merged_rows()[:M].t() + gate.bias[:M].detach()
    # Halfway between two neighbouring values: rounding cannot move any across.
    near = pre.flatten().sort().values
    at = len(near) * 3 // 4 + int(near[len(near) * 3 // 4 :][:30].diff().argmax())
    check_report(index.report(x, (near[at] + near[at + 1]).item() / 2), pre, (near[at] + near[at + 1]).item() / 2)


def test_report_has_exact_ties_after_live_updates_too() -> None:
    """Zero base weights leave U V and the bias, here integers: pre-activations equal to the threshold count."""
    index = made(rank=2, alpha=2.0)
    gate = index.inputs[0]
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.copy_(integers(M, seed=2))
    index.build()
    x = integers(N, D, seed=3)
    for round_ in range(3):
        with torch.no_grad():
            gate.update.U.copy_(integers(M, 2, seed=10 + round_))
            gate.update.V.copy_(integers(2, D, seed=20 + round_))
        pre = x @ (gate.update.U @ gate.update.V).t() + gate.bias
        assert (pre == 4).sum() > 3
        check_report(index.report(x, 4.0), pre.detach(), 4.0)


@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {}], ids=["fused", "foreach", "default"])
def test_report_follows_optimizer_steps(settings: dict[str, bool]) -> None:
    """A fused optimizer writes to tensors without raising their version counters."""
    index = made()
    gate, x = index.inputs[0], inputs()
    before = index.report(x, 0.5)
    optimizer = torch.optim.AdamW(gate.update.parameters(), lr=0.3, **settings)
    for factor in gate.update.parameters():
        factor.grad = torch.randn_like(factor)
    optimizer.step()
    pre = (x @ gate.merged_rows().t() + gate.bias).detach()
    after = index.report(x, 0.5)
    assert after.neurons.tolist() != before.neurons.tolist()
    assert [after.of(i).tolist() for i in range(N)] == [(row >= 0.5).nonzero().flatten().tolist() for row in pre]


@pytest.mark.parametrize("change", ["weight", "fold", "restart"])
def test_report_follows_other_changes(change: str) -> None:
    index = made()
    gate, x = index.inputs[0], inputs()
    index.report(x, 0.5)
    if change == "weight":
        with torch.no_grad():
            gate.weight.mul_(-1.5)
        assert index.rebuild_if_stale()
    elif change == "fold":
        index.fold()
    else:
        gate.update.restart()
    pre = (x @ gate.merged_rows().t() + gate.bias).detach()
    assert (pre - 0.5).abs().min() > 1e-4
    assert [index.report(x, 0.5).of(i).tolist() for i in range(N)] == [
        (row >= 0.5).nonzero().flatten().tolist() for row in pre
    ]


@pytest.mark.parametrize("factory", ["IVF4,Flat", "HNSW16"])
def test_approximate_factories_report_a_part_and_nothing_wrong(factory: str) -> None:
    exact, index = made(), made(index_factory=factory)
    x = inputs()
    everything, found = exact.report(x, 0.5), index.report(x, 0.5)
    assert 0 < len(found.neurons) <= len(everything.neurons)
    for token in range(N):
        assert set(found.of(token).tolist()) <= set(everything.of(token).tolist())


@pytest.mark.parametrize("factory", ["Flut", "IVF,Flat", "PQ7", "Flat,,", "IVF99999999999,Flat"])
def test_a_factory_that_faiss_does_not_know_is_refused_at_once(factory: str) -> None:
    model = opt()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=f"index_factory.*{factory}"):
        patch_model(model, SubquadConfig(**{**CONFIG.to_dict(), "index_factory": factory}))
    assert_same(before, snapshot(model))


def test_a_factory_for_more_neurons_is_a_config_error() -> None:
    index = made(index_factory="IVF4096,Flat")
    with pytest.raises(ConfigError, match=r"index_factory.*IVF4096,Flat.*40 neurons"):
        index.report(inputs(), 0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_spoiled_token_does_not_change_what_others_report(value: float) -> None:
    index, x = made(), inputs()
    expected = index.report(x, 0.5)
    x[3] = value
    found = index.report(x, 0.5)
    assert len(expected.neurons) > N
    for token in range(N):
        assert token == 3 or torch.equal(found.of(token), expected.of(token))
    assert found.values.ge(0.5).all()


# Selection


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["similar", "consecutive"])
def test_recall_is_one_with_a_full_sketch_and_all_tokens_scored(kind: Kind, order: str) -> None:
    assert recall(made(kind), inputs(32), k=9, tile_size=16, order=order) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_recall_falls_with_the_rank_of_the_sketch(kind: Kind) -> None:
    """Without updates, which enter exactly whatever the rank."""
    recalls = []
    for rank in (12, 6, 1):
        index = made(kind, sketch_rank=rank)
        for projection in index.inputs:
            projection.update.restart()
        recalls.append(recall(index, inputs(64), k=9, tile_size=16))
    assert recalls[0] == 1.0
    assert recalls[0] > recalls[1] > recalls[2] > 0


def test_recall_is_a_share_of_the_true_top() -> None:
    """By hand: the true importance of every neuron in every tile, and how much of its top was chosen."""
    index = made(sketch_rank=3)
    x, k = inputs(48), 7
    selection = index.select(x, k, 16, "similar")
    gate = index.inputs[0]
    pre = x @ gate.merged_rows().t() + gate.bias
    now, moved = (torch.nn.functional.gelu(h) for h in (pre, pre + 0.1 * pre.square().mean(1, keepdim=True).sqrt()))
    true = (now**2 + (moved - now) ** 2) * index.output.merged_rows().square().sum(1)
    hits = []
    for slots, chosen in zip(selection.tiles.slots, selection.neurons, strict=True):
        best = set(true[slots].sum(0).topk(k).indices.tolist())
        hits.append(len(best & set(chosen.tolist())) / k)
    assert 0 < sum(hits) / len(hits) < 1
    assert recall(index, x, k, 16) == pytest.approx(sum(hits) / len(hits))


def planted() -> tuple[ActivationIndex, Tensor, Tensor]:
    """An index where group g of tokens fires neurons 5 g .. 5 g + 4 and nothing else, tokens, and their groups."""
    index = made(sketch_rank=4)
    with torch.no_grad():
        index.inputs[0].weight.zero_()
        index.inputs[0].bias.fill_(-3.0)
        for projection in (*index.inputs, index.output):
            projection.update.restart()
        for group in range(4):
            index.inputs[0].weight[5 * group : 5 * group + 5, group] = 8.0
        index.output.weight.fill_(0.1)
    index.build()
    group = torch.arange(4).repeat_interleave(16)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    x = torch.zeros(64, D)
    x[torch.arange(64), group] = 1.0
    return index, x + 0.001 * torch.randn(64, D, generator=torch.Generator().manual_seed(1)), group


def test_select_finds_planted_neurons() -> None:
    index, x, group = planted()
    selection = index.select(x, 5, 16, "similar")
    assert selection.neurons.dtype == torch.int64 and selection.neurons.shape == (4, 5)
    seen = set()
    for slots, chosen in zip(selection.tiles.slots, selection.neurons, strict=True):
        groups = set(group[slots].tolist())
        assert len(groups) == 1
        g = groups.pop()
        assert sorted(chosen.tolist()) == list(range(5 * g, 5 * g + 5))
        seen.add(g)
    assert seen == {0, 1, 2, 3}


def test_select_weighs_by_output_rows() -> None:
    """A neuron that fires but writes nothing is not important."""
    index, x, _ = planted()
    with torch.no_grad():
        index.output.weight[:, 2] = 0.0
    index.build()
    chosen = index.select(x, 5, 16, "similar").neurons
    assert not (chosen == 2).any()
    assert sorted({0, 1, 3, 4} & set(chosen.flatten().tolist())) == [0, 1, 3, 4]


def test_select_sees_live_updates_at_once() -> None:
    index, x, group = planted()
    before = index.select(x, 5, 16, "similar").neurons
    assert 39 not in before.flatten().tolist()
    update = index.inputs[0].update
    with torch.no_grad():
        update.U[39], update.V[:] = 50.0, 0.0
        update.V[:, 1] = 1.0  # neuron 39 now fires on group 1
    selection = index.select(x, 5, 16, "similar")
    for slots, chosen in zip(selection.tiles.slots, selection.neurons, strict=True):
        assert (39 in chosen.tolist()) == (group[slots[0]].item() == 1)


def test_select_without_repeats_and_repeatable() -> None:
    index = made("gated")
    state = torch.get_rng_state()
    first, second = (index.select(inputs(50), 13, 8, "similar") for _ in range(2))
    assert torch.equal(first.neurons, second.neurons) and torch.equal(first.tiles.slots, second.tiles.slots)
    assert all(len(set(tile.tolist())) == 13 for tile in first.neurons)
    assert torch.equal(torch.get_rng_state(), state)


def test_select_all() -> None:
    selection = made().select(inputs(), M, 4, "similar")
    assert (selection.neurons.sort().values == torch.arange(M)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
def test_an_activation_with_parameters_in_any_dtype(dtype: torch.dtype, autocast: bool) -> None:
    """PReLU refuses values of another dtype than its slope's."""
    weights = torch.float32 if autocast else dtype
    module, mlp, _ = patched("plain", D, M, dtype=weights, activation=torch.nn.PReLU(), active=9, tile_size=8)
    x = inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        module(x.to(weights)).sum().backward()
    assert mlp.index.activation.weight.grad.isfinite().all()
    assert recall(mlp.index, x.to(weights), 9, 8) > 0.5


def test_select_in_float16_does_not_overflow() -> None:
    """Activations of 300 and 600 square beyond what float16 holds; they must still be told apart."""
    _, mlp, _ = patched("plain", D, M, dtype=torch.float16, sketch_rank=D)
    index = mlp.index
    with torch.no_grad():
        for projection in mlp.projections:
            projection.update.restart()
        index.inputs[0].weight.zero_()
        index.inputs[0].bias.fill_(300.0)
        index.inputs[0].bias[-6:] = 600.0
        index.output.weight.fill_(0.1)
    index.build()
    chosen = index.select(inputs(16).half(), 6, 16, "similar").neurons
    assert sorted(chosen.flatten().tolist()) == list(range(M - 6, M))


def test_features_that_are_not_finite_do_not_crash() -> None:
    selection = made().select(torch.full((20, D), float("nan")), 5, 4, "similar")
    assert selection.neurons.shape == (4, 5)
    assert ((selection.neurons >= 0) & (selection.neurons < M)).all()


# Staying current


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("the weights were read")


@pytest.mark.parametrize("kind", KINDS)
def test_a_fold_moves_updates_into_weights_and_sketch(kind: Kind) -> None:
    index = made(kind, sketch_rank=6)
    x = inputs(64)
    live = [projection.merged_rows().clone() for projection in (*index.inputs, index.output)]
    before = recall(index, x, 9, 16)
    index.fold()
    whole = index_module.build_sketch(torch.cat(live[:-1]), 6, index.seed)
    assert torch.equal(index.sketch.codes, whole.codes) and torch.equal(index.sketch.basis, whole.basis)
    for projection, rows in zip((*index.inputs, index.output), live, strict=True):
        assert torch.equal(projection.rows(), rows)
        assert projection.update.is_zero() and projection.update.restarts == 1
    torch.testing.assert_close(index.output_norms, live[-1].square().sum(1))
    after = recall(index, x, 9, 16)
    assert after >= before - 0.25 and after > 9 / M


def test_fold_keeps_recall_with_a_full_sketch() -> None:
    index = made("gated")
    for round_ in range(3):
        with torch.no_grad():
            for projection in (*index.inputs, index.output):
                for factor in projection.update.parameters():
                    factor.copy_(torch.randn(factor.shape, generator=torch.Generator().manual_seed(round_)) * 0.3)
        index.fold()
        assert recall(index, inputs(32), 9, 16) == pytest.approx(1.0, abs=0.04)


def neurons(index: ActivationIndex) -> Tensor:
    return index.select(inputs(32), 9, 8, "similar").neurons.sort().values


def test_a_query_goes_on_with_a_stale_sketch_and_says_so_once() -> None:
    index = made()
    before, chosen = index.sketch, neurons(index)
    with torch.no_grad():
        index.inputs[0].weight.neg_()
    with pytest.warns(UserWarning, match=f"weights of {index.name or '.*'} were changed.*sync_model"):
        assert torch.equal(neurons(index), chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index.report(inputs(), 0.5)
        assert index.sketch is before
        assert index.rebuild_if_stale() and not index.rebuild_if_stale()
        assert recall(index, inputs(16), 5, 16) == 1.0
    with torch.no_grad():
        index.output.weight.neg_()
    with pytest.warns(UserWarning, match="were changed"):
        neurons(index)


def test_a_refresh_sees_weights_that_were_changed_behind_the_version_counter() -> None:
    index, other = made(), made()
    for one in (index, other):
        one.inputs[0].weight.data.mul_(-1.5)
    assert not index.rebuild_if_stale()
    index.refresh()
    other.build()
    assert torch.equal(index.sketch.basis, other.sketch.basis)


def test_a_refresh_drops_copies_of_such_weights() -> None:
    model = patch_model(opt(), CONFIG)
    projection = sparse_mlps(model)[0].inputs[0]
    before = projection.rows(torch.bfloat16).clone()
    projection.weight.data.mul_(-1.5)
    sparse_mlps(model)[0].index.refresh()
    assert torch.equal(projection.rows(torch.bfloat16), (projection.weight.detach()).bfloat16())
    assert not torch.equal(projection.rows(torch.bfloat16), before)


def test_training_rebuilds_a_stale_sketch_at_the_next_sync() -> None:
    model = patch_model(opt(), CONFIG)
    first, second = sparse_mlps(model)[:2]
    sketches = first.index.sketch, second.index.sketch
    with torch.no_grad():
        first.inputs[0].weight.mul_(1.5)
    sync_model(model, 1)
    assert first.index.sketch is not sketches[0] and second.index.sketch is sketches[1]
    torch.testing.assert_close(first.index.sketch.basis, 1.5 * sketches[0].basis, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_rebuilds_the_index_at_once(assign: bool) -> None:
    model, other = patch_model(opt(), CONFIG), opt()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    model.load_state_dict(other.state_dict(), assign=assign)
    fresh = patch_model(other, CONFIG)
    for mine, theirs in zip(sparse_mlps(model), sparse_mlps(fresh), strict=True):
        assert torch.equal(mine.index.sketch.codes, theirs.index.sketch.codes)
        assert torch.equal(mine.index.output_norms, theirs.index.output_norms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_moves_the_index(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sketch serves, without a word, also in a copy of the model."""
    model = patch_model(opt(), CONFIG)
    monkeypatch.setattr(index_module, "build_sketch", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for moved in (copy.deepcopy(model), model):
            copied = copy.deepcopy(moved.to(dtype))
            copied(tokens()).logits.sum().backward()
            assert not any(mlp.index.rebuild_if_stale() for mlp in sparse_mlps(copied))


def test_a_copy_that_was_changed_is_stale() -> None:
    model = copy.deepcopy(patch_model(opt(), CONFIG))
    index = sparse_mlps(model)[0].index
    with torch.no_grad():
        index.inputs[0].weight.neg_()
    with pytest.warns(UserWarning, match=index.name):
        model(tokens())
    assert index.rebuild_if_stale()


# Fitted to tokens


def narrow(count: int = 300, seed: int = 6) -> Tensor:
    """Tokens that lie near 3 of D directions, along which the weights are no larger than elsewhere."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(3, D, generator=generator)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=generator) @ directions + 0.05 * torch.randn(count, D, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_finds_more_of_the_neurons_that_matter(kind: Kind) -> None:
    index, x = made(kind, sketch_rank=4), narrow(seed=8)
    before = recall(index, x, 9, 16)
    index.fit(narrow())
    after = recall(index, x, 9, 16)
    assert after > 0.85 and after - before > 0.5 * (1 - before)
    sketch = index.sketch
    index.build()  # as after loading weights: still for these tokens
    assert torch.equal(index.sketch.codes, sketch.codes)


def test_a_fit_takes_tokens_of_any_shape_and_a_sample_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    index, x, state = made(sketch_rank=4), narrow(5000), torch.get_rng_state()
    seen: list[Tensor] = []
    summary_of = index_module.summary_of
    monkeypatch.setattr(index_module, "summary_of", lambda *given: seen.append(given[0]) or summary_of(*given))
    for tokens_ in (x, x.view(50, 100, D), x[:70]):
        index.fit(tokens_)
    assert [len(tokens_) for tokens_ in seen] == [2048, 2048, 70]
    assert torch.equal(seen[0], seen[1]) and torch.equal(torch.get_rng_state(), state)
    places = (x[:, None, 0] == seen[0][None, :, 0]).any(1).nonzero().flatten()
    assert len(places) == 2048 and places[-1] - places[0] > 4900 and places.diff().max() < 50  # spread, each once


def test_a_fold_keeps_a_fit() -> None:
    index, x = made("gated", sketch_rank=5), narrow(seed=8)
    index.fit(narrow())
    before = recall(index, x, 9, 16)
    index.fold()
    assert recall(index, x, 9, 16) > before - 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_fit_to_spoiled_tokens_is_refused_and_changes_nothing(value: float) -> None:
    index, x = made(), narrow()
    index.fit(x)
    sketch, summary = index.sketch, index.summary
    spoiled = x.clone()
    spoiled[3, 4] = value
    with pytest.raises(CalibrationError, match="tokens"):
        index.fit(spoiled)
    assert index.sketch is sketch and index.summary is summary


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_changed_weights_that_are_not_finite_are_named(value: float) -> None:
    model = patch_model(opt(), CONFIG)
    state = model.state_dict()
    good = state["model.decoder.layers.2.fc1.weight"].clone()
    spoiled = good.clone()
    spoiled[3, 4] = value
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"layers\.2"):
            model.load_state_dict({**state, "model.decoder.layers.2.fc1.weight": spoiled})
    with pytest.raises(WeightsError, match=r"layers\.2"):
        sync_model(model, 1)
    model.load_state_dict({**state, "model.decoder.layers.2.fc1.weight": good})
    assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_norms_of_output_rows_are_live_after_refresh(family: str) -> None:
    index = sparse_mlps(trained(family))[0].index
    stale = index.output_norms.clone()
    index.refresh()
    torch.testing.assert_close(index.output_norms, index.output.merged_rows().square().sum(1))
    assert not torch.allclose(stale, index.output_norms)


def test_index_is_no_part_of_the_model() -> None:
    model = patch_model(opt(), SubquadConfig(**{**CONFIG.to_dict(), "index_factory": "HNSW16"}))
    model(tokens())
    assert not any("sketch" in name or "index" in name for name, _ in model.named_buffers())
    assert all(not list(p.buffers()) for mlp in sparse_mlps(model) for p in mlp.projections)
