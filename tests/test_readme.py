"""The README tells the truth about settings, files and its first example."""

import dataclasses
import json
import re
from pathlib import Path

from helpers.models import opt, tokens
from transformers import Trainer, TrainingArguments

from hf_subquad import SubquadConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_settings_table_is_the_dataclass() -> None:
    rows = [row for row in README.splitlines() if re.match(r"\| `\w+` \| `", row)]
    expected = [
        f"| `{f.name}` | `{json.dumps(f.default)}` | {f.metadata['help']} |" for f in dataclasses.fields(SubquadConfig)
    ]
    assert rows == expected


def test_files_that_it_names_exist() -> None:
    named = set(re.findall(r"\]\(((?!http)[^)#]+)\)", README)) | set(
        re.findall(r"\b(?:recipes|scripts)/[\w./-]+\w", README)
    )
    assert len(named) >= 6
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_the_three_lines_train_and_save(tmp_path: Path) -> None:
    block = re.search(r"```diff\n(.*?)```", README, re.DOTALL)
    assert block is not None
    lines = [line[2:] for line in block[1].splitlines() if "from_pretrained" not in line]
    code = "\n".join(lines).replace('"out"', repr(str(tmp_path / "out")))
    ids = tokens(shape=(4, 16))
    names = {
        "model": opt(),
        "Trainer": Trainer,
        "dataset": [{"input_ids": row, "labels": row} for row in ids],
        "args": TrainingArguments(str(tmp_path / "run"), max_steps=2, use_cpu=True, report_to="none"),
    }
    exec(code, names)  # the README's own words
    assert (tmp_path / "out" / "model.safetensors").is_file()
