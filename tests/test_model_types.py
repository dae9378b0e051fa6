"""The sweep over transformers' model types: is each patched right or refused by name, and does the page say so?

By default one type or more of every row of the table of families; all types with `-m slow`.
"""

import copy
from collections.abc import Iterator

import list_models
import pytest
import torch
import transformers
from helpers.proof import NotComparedError, prove
from helpers.tiny_models import class_name, model_types, tiny_batch, tiny_model
from list_models import PAGE, SECTIONS, Verdict, page, verdict
from transformers.utils import logging

from hf_subquad.layers.sparse_mlp import OutputProjection
from hf_subquad.ops.backends.torch_backend import TorchBackend
from hf_subquad.patching.mlp_patterns import FAMILIES
from hf_subquad.weights.projection_with_update import NeuronProjection

TEXT = PAGE.read_text(encoding="utf-8")
ROWS = {
    line.split(" | ")[0].removeprefix("| "): line
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith("| type |")
}

# Decoders, encoders, both, vision, video and speech.
SPARSE = (
    "llama", "phi3", "arcee", "mt5", "t5", "modernbert", "lfm2", "bart", "whisper", "vit", "clip", "gpt2", "gptj",
    "gpt_neox", "bloom", "mpt", "falcon", "llama4_text", "bert", "deberta", "albert", "videomae", "wav2vec2",
    "distilbert", "parakeet_ctc", "funnel", "xlnet", "qwen3_vl_vision", "gemma4_vision", "qwen3", "gemma2", "glm",
    "phi", "gpt_neo", "electra",
)  # fmt: skip
TESTED = ("sam3_tracker",)  # too many inputs to compare
REFUSED = ("bitnet", "moonshine", "swiftformer")
NOTHING = ("mixtral", "gpt_oss", "falcon_mamba")

SAME_VERSION = f"transformers {transformers.__version__} " in TEXT
same_version = pytest.mark.skipif(not SAME_VERSION, reason="the page is of another version of transformers")


@pytest.fixture(scope="module", autouse=True)
def _verbosity() -> Iterator[None]:
    before = logging.get_verbosity()  # which the sweep lowers
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.mark.parametrize("model_type", [name for name in SPARSE if SAME_VERSION or name in model_types()])
def test_patched_model_is_the_same_model(model_type: str) -> None:
    found = verdict(model_type)
    if found.section == "not built" and not SAME_VERSION:
        pytest.skip("this transformers has other settings for it")
    assert found.section == "sparse"
    assert found.row == ROWS[model_type] or not SAME_VERSION


@same_version
@pytest.mark.parametrize(
    ("model_type", "section"),
    [*((t, "tested") for t in TESTED), *((t, "refused") for t in REFUSED), *((t, "none") for t in NOTHING)],
)
def test_others_are_where_the_page_says(model_type: str, section: str) -> None:
    found = verdict(model_type)
    assert found.section == section
    assert found.row == ROWS[model_type]


@same_version
@pytest.mark.slow
@pytest.mark.parametrize("model_type", model_types())
def test_page_says_what_the_sweep_finds(model_type: str) -> None:
    found = verdict(model_type)
    if "ModuleNotFoundError" in found.row:
        pytest.skip(found.row)
    assert found.row == ROWS[model_type]


@same_version
def test_page_lists_every_model_type_once() -> None:
    assert sorted(ROWS) == model_types()
    assert len([line for line in TEXT.splitlines() if line.startswith("| ")]) == len(ROWS) + len(SECTIONS)
    for model_type, row in ROWS.items():
        assert row.startswith(f"| {model_type} | {class_name(model_type)} | ")


@same_version
def test_page_is_of_this_form() -> None:
    """Headings, texts and columns; rows are compared by the tests above."""
    headings = {section.title: name for name, section in SECTIONS.items()}
    verdicts, name = [], ""
    for line in TEXT.splitlines():
        if line.startswith("## "):
            name = headings[line.removeprefix("## ").rpartition(":")[0]]
        elif line in ROWS.values():
            model_type, _, *cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
            verdicts.append(Verdict(model_type, name, tuple(cells)))
    assert page(verdicts).splitlines()[3:] == TEXT.splitlines()[3:]


def test_every_family_is_tried() -> None:
    for *inputs, output in FAMILIES:
        projections = f"`{'`, `'.join(inputs)}` / `{output}`"
        assert any(projections in ROWS[model_type] for model_type in (*SPARSE, *TESTED)), projections


def _wrong_forward(patch: pytest.MonkeyPatch) -> None:
    right = OutputProjection.forward
    patch.setattr(OutputProjection, "forward", lambda self, a: right(self, a) * (1.01 if self.training else 1))


def _wrong_gradients(patch: pytest.MonkeyPatch) -> None:
    right = TorchBackend.update_gradients
    patch.setattr(TorchBackend, "update_gradients", lambda *args: tuple(1.01 * gradient for gradient in right(*args)))


def _wrong_saving(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(NeuronProjection, "merged_weight", lambda self: self.weight.detach().clone())


def _wrong_unpatching(patch: pytest.MonkeyPatch) -> None:
    right = NeuronProjection.set_rows
    patch.setattr(NeuronProjection, "set_rows", lambda self, rows: right(self, rows.nextafter(rows + 1)))


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (_wrong_forward, "sparse: outputs"),
        (_wrong_gradients, "sparse: gradients"),
        (_wrong_saving, "the saved model"),
        (_wrong_unpatching, "unpatched weights"),
    ],
)
def test_proof_fails_where_something_is_wrong(spoil, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("opt")
    inputs = tiny_batch(model)
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match=what):
        prove(model, inputs)


def test_inputs_that_reach_no_mlp_prove_nothing() -> None:
    model = tiny_model("clip")
    model.forward = lambda **_: torch.ones(3, requires_grad=True) * 2
    with pytest.raises(NotComparedError):
        prove(model, {})


def test_tiny_models_are_the_same_each_time() -> None:
    one, other = tiny_model("bert"), tiny_model("bert")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert all(value.any() for value in copy.deepcopy(one).parameters())


def test_rows_are_printed_for_types_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    before = TEXT
    assert list_models.main(["opt"]) == 0
    assert ROWS["opt"] in capsys.readouterr().out
    assert PAGE.read_text(encoding="utf-8") == before
