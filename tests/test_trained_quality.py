"""The study of SparseLoRA's recipe: its neuron sets are those of sequences."""

import pytest
import torch
from helpers.models import llama

pytest.importorskip("peft")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

from studies.trained_quality import SequenceSets, sequence_tiles

from hf_subquad import SubquadConfig, patch_model, sparse_mlps
from hf_subquad.layers.budget import Budget


def test_a_tile_is_a_sequence() -> None:
    tiles = sequence_tiles([3, 0, 5, 1], 9, torch.device("cpu"))
    assert tiles.shape == (3, 5)
    real = [[token for token in row if token < 9] for row in tiles.entries.tolist()]
    assert real == [[0, 1, 2], [3, 4, 5, 6, 7], [8]]
    assert tiles.entries.flatten().sort().values.tolist() == list(range(15))
    values = torch.randn(9, 2)
    assert torch.equal(tiles.to_tokens(tiles.to_slots(values)), values)


def test_context_tokens_of_a_sequence_share_their_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(llama(), SubquadConfig(rank=2, sketch_rank=8, layers_to_transform="all"))
    mlp, counts, made = sparse_mlps(model)[0], [6, 3], []
    sets = SequenceSets(mlp.index, counts)
    monkeypatch.setattr(mlp.index, "select", lambda *given: made.append(sets(*given)) or made[-1])
    mlp.set_budget(Budget(context=8))
    ids = torch.randint(4, 30, (2, 8))
    labels = ids.clone()
    labels[0, :7], labels[1, :4] = -100, -100  # the last of them predicts the first label
    model.train()
    model(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids)).loss.backward()
    [selection] = made
    assert selection.tiles.shape == (2, 6) and selection.tiles.tokens == 9
    assert selection.neurons.shape[0] == 2
