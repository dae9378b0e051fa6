"""How faithful sparse MLPs are: nothing is lost by exact ones, and what is lost is measured right."""

from typing import Any

import pytest
import torch
import transformers
from helpers.models import CONFIG, build, fill_updates, opt, tokens, trained
from helpers.planning import text_batches
from torch import Tensor, nn

from hf_subquad import CalibrationError, SubquadConfig, dense_forward, patch_model, sparse_forward, sparse_mlps
from hf_subquad.layers.budget import Budget
from hf_subquad.planning import divergence, fidelity
from hf_subquad.planning.fidelity import DenseReference, Fidelity

BATCH = text_batches(0, shape=(6, 9), prompt=4)[0]


def model_with(*budgets: Budget, family: str = "opt") -> nn.Module:
    model = trained(family, size=0.1).eval()
    for mlp, budget in zip(sparse_mlps(model), budgets, strict=True):
        mlp.set_budget(budget)
    return model


def measured(model: nn.Module, batch: dict[str, Tensor]) -> Fidelity:
    with dense_forward(model):
        reference = DenseReference(model, batch)
    with sparse_forward(model):
        return reference.fidelity()


def gradient_by_hand(model: nn.Module, batch: dict[str, Tensor], without: tuple[str, ...] = ()) -> Tensor:
    model.zero_grad()
    model(**batch).loss.backward()
    trained = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith(without)]
    found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])
    model.zero_grad()
    return found.double()


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_exact_budgets_lose_nothing(family: str) -> None:
    """Padding is skipped, the dense model computes it: both up to rounding of float32 sums."""
    found = measured(model_with(Budget(), Budget(), family=family), BATCH)
    assert found.divergence < 1e-6 and found.cosine == pytest.approx(1, abs=1e-6) and found.gradient_error < 1e-4
    assert found.lost < 1e-5


def test_the_dense_model_is_itself() -> None:
    model = model_with(Budget(8, 0), Budget())
    with dense_forward(model):
        found = DenseReference(model, BATCH).fidelity()
    assert found == Fidelity(0.0, pytest.approx(1, abs=1e-9), 0.0)


BUDGETS = [Budget(16, 0), Budget(None, 8), Budget(None, None, 0.8), Budget(24, 24, 0.9)]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_cosine_and_error_are_those_of_gradients_by_hand(budget: Budget) -> None:
    """Of all that is trained before the last MLP, the layers that are not patched included."""
    after = ("model.decoder.final_layer_norm",)
    model = model_with(budget, budget)
    torch.manual_seed(0)  # of the rows that are sampled
    found = measured(model, BATCH)
    with dense_forward(model):
        exact = gradient_by_hand(model, BATCH, after)
    torch.manual_seed(0)
    with sparse_forward(model):
        approximate = gradient_by_hand(model, BATCH, after)
    cosine = (exact @ approximate / exact.norm() / approximate.norm()).item()
    assert found.cosine == pytest.approx(cosine, abs=1e-6) and cosine < 0.9999
    assert found.gradient_error == pytest.approx(((exact - approximate).norm() / exact.norm()).item(), rel=1e-3)
    assert found.lost == pytest.approx(1 - cosine**2, abs=1e-5)
    assert (found.divergence > 1e-6) == (budget.gradient == 1 or budget.predicted is not None)


def test_a_new_head_hides_no_error_of_what_is_below_it() -> None:
    """Its own gradient is exact, and at first nearly all of the whole one."""
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = patch_model(transformers.BertForSequenceClassification(config), CONFIG).eval()
    fill_updates(model, size=0.1)
    with torch.no_grad():
        model.classifier.weight.mul_(1e-3)
    model.bert.requires_grad_(False)
    for mlp in sparse_mlps(model):
        mlp.set_budget(Budget(None, None, 0.5))
        for projection in mlp.projections:
            projection.update.requires_grad_(True)
    batch = {"input_ids": tokens(0, (6, 9)), "labels": torch.arange(6) % 2}
    torch.manual_seed(0)  # of the rows that are sampled
    found = measured(model, batch)
    with dense_forward(model):
        exact = gradient_by_hand(model, batch)
    torch.manual_seed(0)
    with sparse_forward(model):
        approximate = gradient_by_hand(model, batch)
    assert (exact - approximate).norm() / exact.norm() < 0.01
    assert found.gradient_error > 0.1 and found.cosine < 0.99


def test_a_head_of_zeros_lets_no_gradient_through() -> None:
    """Then all parameters are compared, because the others tell nothing."""
    model = trained("opt", size=0.1).eval()
    with torch.no_grad():
        model.lm_head.weight = nn.Parameter(0 * model.lm_head.weight)  # no longer that of the embeddings
    for mlp in sparse_mlps(model):
        mlp.set_budget(Budget(8, 8))
    with dense_forward(model):
        reference = DenseReference(model, BATCH)
    with sparse_forward(model):
        assert reference.fidelity().cosine < 0.9999


def test_layers_that_checkpointing_repeats_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the graph of every layer, with its activations, would be kept."""
    seen = []
    monkeypatch.setattr(fidelity, "leaves_behind", lambda values: seen.extend(values) or set())
    model = patch_model(build("bert"), CONFIG)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with dense_forward(model.eval()):
        DenseReference(model, {"input_ids": tokens(0, (2, 9)), "labels": tokens(1, (2, 9))})
    assert len(seen) == len(sparse_mlps(model))


def test_context_of_the_last_layer_needs_no_mlp() -> None:
    """Nothing sees what it computes there: gradient and predictions are exact. In the layer before, they are not."""
    found = measured(model_with(Budget(), Budget(None, 0)), BATCH)
    assert found.divergence < 1e-6 and found.cosine == pytest.approx(1, abs=1e-6) and found.gradient_error < 1e-4
    before = measured(model_with(Budget(None, 0), Budget()), BATCH)
    assert before.cosine < 0.9999 and before.gradient_error > 1e-3


def test_without_labels_padding_has_no_part_in_the_gradient() -> None:
    """Of the stand-in for the loss: with more padding it is the same."""
    model = trained("opt", size=0.1).eval()
    ids = tokens(0, (3, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {name: nn.functional.pad(value, (0, 4)) for name, value in batch.items()}
    with dense_forward(model):
        (_, found), (_, expected) = DenseReference(model, padded).step(), DenseReference(model, batch).step()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))


def test_without_labels_all_tokens_have_a_part_in_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those at which predictions are not compared, where there are many."""
    model, batch = trained("opt", size=0.1).eval(), {"input_ids": tokens(0, (3, 7))}
    with dense_forward(model):
        _, expected = DenseReference(model, batch).step()
        monkeypatch.setattr(divergence, "_JUDGED", 4)
        _, found = DenseReference(model, batch).step()
    assert all(map(torch.equal, found, expected))


def test_without_labels_a_decoder_has_its_own_padding() -> None:
    model = patch_model(build("bart"), CONFIG).eval()
    ids, mask = tokens(0, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    real = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids, "decoder_attention_mask": real}
    other = {**batch, "decoder_input_ids": torch.where(real == 1, ids, 5)}
    with dense_forward(model):
        (_, found), (_, expected) = (DenseReference(model, each).step() for each in (batch, other))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_its_last_place(dtype: torch.dtype) -> None:
    """Its effect is of the size of the dtype's rounding, and that of later layers is less."""
    model = patch_model(build("opt", dtype), CONFIG).eval()
    with dense_forward(model):
        reference = DenseReference(model, BATCH)
        first, last = (reference.rounding(mlp.output) for mlp in (sparse_mlps(model)[0], sparse_mlps(model)[-1]))
        assert reference.fidelity() == Fidelity(0.0, pytest.approx(1, abs=1e-9), 0.0)  # the hook is gone
    eps = torch.finfo(dtype).eps
    assert eps / 100 < last.gradient_error and first.gradient_error < 100 * eps


def test_what_is_beyond_rounding() -> None:
    found, rounding = Fidelity(0.5, 0.6, 0.8), Fidelity(0.2, 0.8, 0.6)  # of which 0.64 and 0.36 are lost
    assert found.beyond(rounding, 0) == found
    assert found.beyond(rounding, 0.5) == Fidelity(
        pytest.approx(0.4), pytest.approx((1 - 0.64 + 0.18) ** 0.5), pytest.approx((0.64 - 0.18) ** 0.5)
    )
    assert rounding.beyond(found, 1) == Fidelity(0.0, 1.0, 0.0)
    opposite = Fidelity(0.5, -0.9, 2.0)
    assert opposite.lost == 1 and opposite.beyond(rounding, 1).cosine == -0.9


class Head(nn.Module):
    """OPT's body under outputs of any kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.kind = opt(), kind

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        found = self.body(input_ids=input_ids, labels=labels)
        if self.kind == "dict":
            return {"loss": found.loss, "logits": found.logits}
        if self.kind == "only a loss":
            return {"loss": found.loss}
        if self.kind == "no loss":
            return {"logits": found.logits}
        if self.kind == "a loss for each row":
            return {"loss": found.loss.expand(2), "logits": found.logits}
        return (found.logits,)


@pytest.mark.parametrize("kind", ["dict", "only a loss", "no loss", "a loss for each row"])
def test_outputs_of_any_kind(kind: str) -> None:
    """Without logits the gradient alone judges, without a loss the likeliest class stands in for a label."""
    model = patch_model(Head(kind), CONFIG).eval()
    fill_updates(model, size=0.1)
    for mlp in sparse_mlps(model):
        mlp.set_budget(Budget(16, 16))
    found = measured(model, BATCH)
    assert 0 < found.cosine < 0.9999 and found.gradient_error > 0.01
    assert (found.divergence > 1e-6) == (kind != "only a loss")


def test_neither_logits_nor_a_loss() -> None:
    with pytest.raises(CalibrationError, match="returns no logits"):
        measured(patch_model(Head("a tuple"), CONFIG).eval(), BATCH)


def test_nothing_is_trained() -> None:
    model = patch_model(opt(), CONFIG).requires_grad_(False)
    with pytest.raises(CalibrationError, match="no parameter of the model is trained"):
        measured(model, BATCH)


def test_a_gradient_of_zero() -> None:
    """Of a loss that hangs on nothing: the same as itself, and unlike any other."""
    model = patch_model(opt(), SubquadConfig(**{**CONFIG.to_dict(), "active": 0.5})).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight.requires_grad_(False)
    found = measured(model, BATCH)
    assert found.cosine == 1 and found.gradient_error == 0 and found.lost == 0
