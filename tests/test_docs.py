"""The documentation tells the truth: its code runs, its commands are accepted, its settings, files and links exist."""

import argparse
import dataclasses
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.commands.launch import launch_command_parser
from helpers.models import opt, tokens
from helpers.planning import hand_plan
from transformers import Trainer, TrainingArguments

import hf_subquad
from hf_subquad import SubquadConfig, cli, patch_model
from hf_subquad.config import COSINE_PER_TOLERANCE, DIVERGENCE_PER_TOLERANCE, NOISE_PER_TOLERANCE

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SETTINGS = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")


def blocks(*languages: str) -> Iterator[Any]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if block[1] in languages:
                line = text[: block.start()].count("\n") + 1
                yield pytest.param(block[2], id=f"{page.relative_to(ROOT)}:{line}")


def commands() -> Iterator[Any]:
    for block in blocks("", "bash", "sh", "console"):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            yield pytest.param(line, id=f"{block.id} {line[:40]}")


class _Accepted(Exception):
    """Raised in place of the work that follows parsing."""


@pytest.fixture
def only_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        parse_args(self, *args, **kwargs)
        raise _Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)


def tiny_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What blocks take for granted: the library, a model, some data."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **settings: opt())
    model, ids = opt(), tokens(shape=(4, 16))
    hand_plan(patch_model(opt(), SubquadConfig(rank=16)), [52, 20, 52]).save(Path("plan.json"))
    return {
        **{name: getattr(hf_subquad, name) for name in hf_subquad.__all__},
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "Trainer": Trainer,
        "model": model,
        "batches": [{"input_ids": ids, "labels": ids}] * 2,
        "dataset": [{"input_ids": row, "labels": row} for row in ids],
        "args": TrainingArguments("run", max_steps=2, save_steps=1, use_cpu=True, report_to="none"),
        "optimizer": torch.optim.AdamW(model.parameters(), 1e-3),
    }


@pytest.mark.parametrize("code", [*blocks("python")])
def test_python_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "fully_shard" in code:
        if torch.__version__ < "2.7":
            pytest.skip("in this version, fully_shard does not run on a CPU")
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        exec(code, tiny_names(tmp_path, monkeypatch))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.parametrize("code", [*blocks("diff")])
def test_script_with_the_added_lines_trains_and_saves(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = [line[2:] for line in code.splitlines() if not line.startswith("-")]
    exec("\n".join(after), tiny_names(tmp_path, monkeypatch))
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("command", [*commands()])
def test_command_is_accepted(command: str, monkeypatch: pytest.MonkeyPatch, only_parsed: None) -> None:
    """By the parser of what it runs: options exist and values are possible."""
    words = [word for word in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "make":
        assert subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True).returncode == 0
        return
    if words[:2] == ["pip", "install"]:
        extras = re.search(r"\[(.*)\]", command)
        assert not extras or all(f"\n{extra} = [" in pyproject() for extra in extras[1].split(","))
        return
    if words[0] == "hf-subquad":
        with pytest.raises(_Accepted):
            cli.main(words[1:])
        return
    assert words[0] == "python" or words[:2] == ["accelerate", "launch"], f"nobody checks {command!r}"
    if words[0] == "accelerate":
        launched = launch_command_parser().parse_known_args(words[2:])[0].training_script
        if launched == "train.py":  # the user's own
            return
    at = next(place for place, word in enumerate(words) if word.endswith(".py"))
    assert all((ROOT / word).is_file() for word in words[: at + 1] if word.endswith((".py", ".yaml")))
    monkeypatch.setattr(sys, "argv", words[at:])
    monkeypatch.syspath_prepend(str((ROOT / words[at]).parent))
    with pytest.raises(_Accepted):
        importlib.import_module(Path(words[at]).stem).main()


def pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_block_is_checked() -> None:
    written = sum(page.read_text(encoding="utf-8").count("\n```") for page in PAGES) // 2
    assert len(list(blocks("python", "diff", "", "bash", "sh", "console"))) == written


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_what_it_links_and_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = {page.parent / link for link in re.findall(r"\]\(((?!http|#)[^)#]+)", text)}
    files = {ROOT / name for name in re.findall(r"\b(?:recipes|scripts|tests)/[\w./-]+\.(?:py|json|yaml|png)\b", text)}
    assert not sorted(os.path.relpath(path, ROOT) for path in links | files if not path.exists())


def test_settings_table_is_the_dataclass() -> None:
    rows = [row for row in SETTINGS.splitlines() if re.match(r"\| `\w+` \| `", row)]
    expected = [
        f"| `{f.name}` | `{json.dumps(f.default)}` | {f.metadata['help']} |" for f in dataclasses.fields(SubquadConfig)
    ]
    assert rows == expected


def test_planning_page_says_what_tolerance_means() -> None:
    page = " ".join((ROOT / "docs" / "planning.md").read_text(encoding="utf-8").split())
    cosine, divergence, noise = COSINE_PER_TOLERANCE, DIVERGENCE_PER_TOLERANCE, NOISE_PER_TOLERANCE
    assert f"at least 1 - {cosine:g} x `tolerance`" in page and f"{divergence:g} x `tolerance` nats" in page
    default = SubquadConfig().tolerance
    assert f"default of {default:g} that is {1 - cosine * default:g}." in page
    assert f"At the default that is {divergence * default:g}." in page
    assert (
        f"at most {noise:g} x `tolerance` of the gradient's squared norm. At the default that is {noise * default:.0%}"
        in page
    )
    (help_text,) = (f.metadata["help"] for f in dataclasses.fields(SubquadConfig) if f.name == "tolerance")
    assert f"at least 1 - {cosine:g} times" in help_text and f"at most {divergence:g} times" in help_text
    assert f"at most {noise:g} times" in help_text


def test_readme_is_short() -> None:
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 120
