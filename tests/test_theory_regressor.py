"""Does the regressor fit, predict, report, and refuse what it cannot use; with scikit-learn and without?"""

import pickle

import numpy as np
import pytest

from hf_subquad import ConfigError
from hf_subquad.theory import DataError, NotFittedError, WideNetRegressor

WIDTH = 512


def data(samples: int = 30, columns: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs on other scales than 1, targets with an offset."""
    draw = np.random.default_rng(seed)
    x = draw.normal(5, 20, (samples, columns))
    return x, 100 + np.sin(x[:, 0] / 20) + 0.1 * x[:, 1]


def fitted(**settings: object) -> WideNetRegressor:
    return WideNetRegressor(**{"width": WIDTH, **settings}).fit(*data())


@pytest.mark.parametrize("solver", ["cholesky", "tensor_sketch", "tensor_srht"])
def test_interpolates_its_samples(solver: str) -> None:
    x, y = data()
    model = fitted(solver=solver)
    np.testing.assert_allclose(model.predict(x), y, atol=0.02 * y.std())
    assert model.score(x, y) > 0.999
    assert model.n_iter_ == len(model.history_) < 20


def test_predicts_samples_that_it_has_not_seen() -> None:
    x, y = data(200)
    model = WideNetRegressor(WIDTH, dtype="float64").fit(x[:100], y[:100])
    assert model.score(x[100:], y[100:]) > 0.6


def test_predictions_do_not_depend_on_the_company_they_are_made_in() -> None:
    model, (x, _) = fitted(), data(600, seed=3)
    one_by_one = np.concatenate([model.predict(row[None]) for row in x[::50]])
    np.testing.assert_allclose(model.predict(x)[::50], one_by_one, rtol=1e-4)


def test_several_targets_are_fitted_together() -> None:
    x, y = data()
    both = np.stack([y, -3 * y + x[:, 2]], 1)
    found = WideNetRegressor(WIDTH).fit(x, both).predict(x)
    assert found.shape == both.shape
    np.testing.assert_allclose(found, both, atol=0.02 * both.std())


def test_history_tells_loss_share_and_seconds() -> None:
    model = fitted()
    losses = [row["loss"] for row in model.history_]
    assert losses[0] == pytest.approx(len(data()[0]) / 2, rel=1e-3)  # zero at the start, of standardised targets
    assert losses == sorted(losses, reverse=True) and model.loss_ <= 1e-6 * losses[0]
    for row in model.history_:
        assert 0 < row["fired_share"] <= WIDTH**-0.2
        assert set(row["seconds"]) == {"forward", "solve", "update", "maintenance"}
    assert model.initialisation_seconds_ > 0


def test_stops_at_max_iter_and_at_tol() -> None:
    assert fitted(max_iter=1).n_iter_ == 1
    loose = fitted(tol=0.5)
    assert loose.n_iter_ < fitted().n_iter_ and loose.loss_ <= 0.5 * loose.history_[0]["loss"]


def test_equal_settings_give_equal_predictions_and_a_pickle_keeps_them() -> None:
    x, _ = data(seed=1)
    model = fitted()
    np.testing.assert_array_equal(model.predict(x), fitted().predict(x))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict(x), model.predict(x))
    assert not np.array_equal(fitted(random_state=1).predict(x), model.predict(x))


def test_constant_columns_and_one_sample_are_fine() -> None:
    x, y = data()
    x[:, 1] = 7
    assert WideNetRegressor(2 * WIDTH).fit(x, y).score(x, y) > 0.99
    assert WideNetRegressor(WIDTH).fit(x[:1], y[:1]).predict(x[:1]) == pytest.approx(y[:1])


def test_progress_bar_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    fitted()
    assert capsys.readouterr().err == ""
    fitted(verbose=True)
    assert "loss=" in capsys.readouterr().err


def test_parameters_can_be_read_and_set() -> None:
    model = WideNetRegressor(WIDTH, damping=0.5)
    assert model.get_params()["damping"] == 0.5 and len(model.get_params()) == 9
    assert model.set_params(width=64, tol=0.1) is model and (model.width, model.tol) == (64, 0.1)
    with pytest.raises(ConfigError, match="unknown parameters \\['depths'\\]"):
        model.set_params(depths=3, width=128)
    assert model.width == 64


def test_works_in_scikit_learn() -> None:
    pytest.importorskip("sklearn")
    from sklearn.base import clone, is_regressor
    from sklearn.model_selection import GridSearchCV, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = data(60)
    model = WideNetRegressor(128, max_iter=2)
    assert is_regressor(model) and clone(model).get_params() == model.get_params()
    assert np.isfinite(cross_val_score(model, x, y, cv=3)).all()
    search = GridSearchCV(make_pipeline(StandardScaler(), model), {"widenetregressor__damping": [1e-4, 1e-2]}, cv=2)
    assert search.fit(x, y).best_estimator_.predict(x).shape == (60,)


def test_samples_and_targets_that_cannot_be_used_are_refused() -> None:
    x, y = data()
    missing = x.copy()
    missing[3, 1] = np.nan
    for wrong_x, wrong_y, message in (
        (missing, y, "X holds NaN"),
        (x, np.where(y > 100, np.inf, y), "y holds NaN or infinite"),
        (x[:, 0], y, "X must be 2-dimensional"),
        (x[:0], y[:0], "not empty"),
        (x, y[:-1], "X has 30 samples, y has 29"),
        (x, y[:, None, None], "y must be 1-dimensional or 2-dimensional"),
        ([["a", "b"]], [1.0], "X must be an array of numbers"),
    ):
        model = WideNetRegressor(WIDTH)
        with pytest.raises(DataError, match=message):
            model.fit(wrong_x, wrong_y)
        with pytest.raises(NotFittedError):
            model.predict(x)


def test_predicting_too_early_or_with_other_columns_is_refused() -> None:
    x, y = data()
    with pytest.raises(NotFittedError, match=r"call fit\(X, y\) first"):
        WideNetRegressor().predict(x)
    model = fitted()
    with pytest.raises(DataError, match="X has 2 columns, fit saw 3"):
        model.predict(x[:, :2])
    with pytest.raises(DataError, match="y must be"):
        model.score(x, y[:-1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"width": 513}, "even width"), ({"depth": 1}, "depth"), ({"max_iter": 0}, "max_iter"),
     ({"dtype": "half"}, "dtype"), ({"solver": "sgd"}, "solver"), ({"damping": -1.0}, "damping")],
)  # fmt: skip
def test_parameters_out_of_range_are_refused_when_fitting(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fitted(**settings)


def test_a_fit_that_fails_leaves_the_one_before() -> None:
    x, y = data()
    model = fitted()
    before = model.predict(x)
    with pytest.raises(ConfigError, match="solver"):
        model.set_params(solver="sgd").fit(x, -y)
    with pytest.raises(DataError):
        model.fit(x, y[:-1])
    np.testing.assert_array_equal(model.predict(x), before)
