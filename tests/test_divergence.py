"""Which predictions of a model count, what kind they are, and how far others are from them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import LENGTH, VOCABULARY, build, opt, tokens
from torch import Tensor, nn

from hf_subquad import CalibrationError
from hf_subquad.planning.divergence import Predictions, logits_of

B, C = 40, 7


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Bare(nn.Module):
    """A model that says of itself what is given, a `problem_type` in its config, say."""

    def __init__(self, problem_type: str | None = None, **attributes: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(problem_type=problem_type)
        for name, value in attributes.items():
            setattr(self, name, value)


def divergence(model: nn.Module, batch: dict[str, Any], before: Tensor, after: Tensor) -> float:
    return Predictions(model, batch, before).divergence(after)


def kullback_leibler(before: Tensor, after: Tensor) -> Tensor:
    """Of the classes in the last dimension."""
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.fixture(autouse=True)
def _trained_head(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "untrained" not in request.node.name:
        monkeypatch.setattr(Predictions, "_information", lambda self: 1.0)


# Kinds


def test_classes_of_rows_in_a_module_that_says_nothing_of_itself() -> None:
    """A classifier without `loss_type` or config: labels [B], logits [B, C]."""
    before, after = noise(B, C), noise(B, C, seed=1)
    found = divergence(nn.Linear(2, 2), {"x": noise(B, 3), "labels": torch.arange(B) % C}, before, after)
    assert found == pytest.approx(kullback_leibler(before, after).mean().item(), rel=1e-5)
    assert divergence(nn.Linear(2, 2), {"labels": torch.arange(B) % C}, before, before + 3.0) == pytest.approx(
        0, abs=1e-6
    )


def bernoulli(before: Tensor, after: Tensor) -> float:
    p, q = before.double().sigmoid(), after.double().sigmoid()
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1).mean().item()


@pytest.mark.parametrize("said", [True, False], ids=["problem_type", "labels of 0 and 1"])
def test_several_labels_are_a_bernoulli_distribution_each(said: bool) -> None:
    before, after = noise(B, C), noise(B, C, seed=1)
    model = Bare("multi_label_classification" if said else None)
    labels = (noise(B, C, seed=2) > 0).float()
    found = divergence(model, {"labels": labels}, before, after)
    assert found == pytest.approx(bernoulli(before, after), rel=1e-4)


def test_large_logits_of_labels_stay_finite() -> None:
    before = torch.tensor([[80.0, -80.0]])
    found = divergence(Bare("multi_label_classification"), {}, before, -before)
    assert found == pytest.approx(160, rel=1e-5)  # each of two labels is off by 80 nats


@pytest.mark.parametrize("said", [True, False], ids=["problem_type", "labels that are numbers"])
@pytest.mark.parametrize("targets", [1, 3])
def test_values_are_gaussians_of_unit_variance(said: bool, targets: int) -> None:
    before, after = noise(B, targets), noise(B, targets, seed=1)
    labels = noise(B, targets, seed=2) if targets > 1 else noise(B, seed=2)
    found = divergence(Bare("regression" if said else None), {"labels": labels}, before, after)
    assert found == pytest.approx((after - before).square().sum(-1).mean().item() / 2, rel=1e-5)


def test_values_without_a_dimension_of_targets() -> None:
    before, after = noise(B), noise(B, seed=1)
    found = divergence(Bare(), {"labels": noise(B, seed=2)}, before, after)
    assert found == pytest.approx((after - before).square().mean().item() / 2, rel=1e-5)


def test_segmentation_has_its_classes_in_the_second_dimension() -> None:
    """[B, C, h, w], also where the labels [B, H, W] are finer."""
    before, after = noise(3, C, 5, 4), noise(3, C, 5, 4, seed=1)
    expected = kullback_leibler(before.movedim(1, -1), after.movedim(1, -1))
    labels = torch.arange(3 * 5 * 4).view(3, 5, 4) % C
    assert divergence(Bare(), {"labels": labels}, before, after) == pytest.approx(expected.mean().item(), rel=1e-5)
    labels[:, 1:] = -100
    found = divergence(Bare(), {"labels": labels}, before, after)
    assert found == pytest.approx(expected[:, 0].mean().item(), rel=1e-5)
    finer = torch.zeros(3, 20, 16, dtype=torch.long)
    assert divergence(Bare(), {"labels": finer}, before, after) == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "classes"), [((B, 4, 9), 4), ((B, 9), 2)], ids=["multiple choice", "next sentence prediction"]
)
def test_a_class_a_row_of_several_tokens(shape: tuple[int, ...], classes: int) -> None:
    before, after = noise(B, classes), noise(B, classes, seed=1)
    labels = torch.arange(B) % classes
    batch = {"input_ids": tokens(0, shape), "attention_mask": torch.ones(shape), "labels": labels}
    expected = kullback_leibler(before, after).mean().item()
    assert divergence(Bare(), batch, before, after) == pytest.approx(expected, rel=1e-5)


def test_question_answering_predicts_a_start_and_an_end() -> None:
    start, end = noise(B, 9), noise(B, 9, seed=1)
    found = logits_of(Bare(), {"loss": torch.zeros(()), "start_logits": start, "end_logits": end})
    assert torch.equal(found, torch.stack([start, end], 1))
    batch = {"start_positions": torch.zeros(B), "end_positions": torch.ones(B), "attention_mask": torch.ones(B, 9)}
    after = noise(B, 2, 9, seed=3)
    expected = kullback_leibler(found, after).mean().item()
    assert divergence(Bare(), batch, found, after) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("outputs", [dict, lambda **held: SimpleNamespace(**held)], ids=["dict", "object"])
@pytest.mark.parametrize("name", ["logits", "prediction_logits"])
def test_logits_are_found_by_name(outputs: Any, name: str) -> None:
    values = noise(2, 3)
    assert logits_of(Bare(), outputs(**{"loss": None, name: values})) is values


@pytest.mark.parametrize("outputs", [{"loss": torch.zeros(())}, {"logits": None, "start_logits": noise(2)}, (1, 2)])
def test_outputs_without_logits_are_an_error_that_says_what_there_is(outputs: Any) -> None:
    with pytest.raises(CalibrationError, match=r"Bare returns no logits \(only (loss|logits, start_logits|tuple)\)"):
        logits_of(Bare(), outputs)


# Which count


def moved(model: nn.Module, batch: dict[str, Tensor], positions: list[int]) -> float:
    """Divergence if one class is shifted at these positions."""
    before = noise(3, LENGTH, VOCABULARY)
    after = before.clone()
    after[:, positions, 7] += 3.0
    return divergence(model, batch, before, after)


def test_masked_labels_are_left_out() -> None:
    """A masked language model predicts the token in its own place."""
    batch = {"input_ids": tokens(0), "labels": torch.full((3, LENGTH), -100)}
    batch["labels"][:, 2] = 9
    assert moved(build("bert"), batch, [0, 1, 3, 4]) == 0
    assert moved(build("bert"), batch, [2]) > 0.01


def test_a_causal_model_predicts_the_next_token() -> None:
    """The label in place 3 is predicted in place 2."""
    batch = {"input_ids": tokens(0), "labels": torch.full((3, LENGTH), -100)}
    batch["labels"][:, 3] = 9
    assert moved(opt(), batch, [2]) > 0.01
    assert moved(opt(), batch, [0, 1, 3, 4]) == 0


def test_padding_is_left_out_if_there_are_no_labels() -> None:
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[:, 3:] = 0
    batch = {"input_ids": tokens(0), "attention_mask": mask}
    assert moved(build("bert"), batch, [3, 4]) == 0
    assert moved(build("bert"), batch, [1]) > 0.01


def test_of_many_predictions_some_are_judged_spread_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_subquad.planning.divergence._JUDGED", 12)
    batch = {"labels": torch.zeros(3, LENGTH, dtype=torch.long)}  # 15: every second one
    before, after = noise(3, LENGTH, C), noise(3, LENGTH, C, seed=1)
    expected = kullback_leibler(before, after).flatten()[::2].mean().item()
    assert divergence(build("bert"), batch, before, after) == pytest.approx(expected, rel=1e-5)


def test_no_label_counts() -> None:
    with pytest.raises(CalibrationError, match="-100"):
        Predictions(opt(), {"labels": torch.full((3, LENGTH), -100)}, noise(3, LENGTH, C))


@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
def test_predictions_that_are_not_finite(problem: str | None) -> None:
    before = noise(B, C)
    after = before.clone()
    after[3, 2] = float("nan")
    with pytest.raises(CalibrationError, match="NaN"):
        divergence(Bare(problem), {}, before, after)


@pytest.mark.parametrize("kind", ["classes", "labels", "value"])
def test_an_untrained_head_does_not_hide_what_is_skipped(kind: str) -> None:
    """A hundredth of the head, a ten thousandth of the divergence: the plan must not take that for harmless."""
    model = Bare("multi_label_classification" if kind == "labels" else None)
    x = noise(300, 1 if kind == "value" else C)
    moved_x = x + 0.1 * x.roll(1, 0)

    def of_size(size: float) -> float:
        return divergence(model, {}, size * x, size * moved_x)

    small, smaller = of_size(0.3), of_size(0.03)
    assert smaller == pytest.approx(small, rel=0.15)
    assert small > 1e-3
    if kind == "classes":
        expected = kullback_leibler(5 * x, 5 * moved_x).mean().item()
    elif kind == "labels":
        expected = bernoulli(5 * x, 5 * moved_x)
    else:
        expected = (5 * moved_x - 5 * x).square().mean().item() / 2
    assert of_size(5.0) == pytest.approx(expected, rel=0.2 if kind == "labels" else 1e-4)
