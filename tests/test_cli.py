"""The command line: what it prints, and how it fails."""

import json
from pathlib import Path

import pytest
from helpers.models import build

from hf_subquad.cli import main


def test_env_names_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert all(package in out for package in ("python", "torch", "transformers", "faiss-cpu", "hf-subquad"))


def test_plan_lists_the_mlps_that_would_be_patched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)  # notes the architecture in the config, unlike config.save_pretrained
    config = tmp_path / "settings.json"
    config.write_text(json.dumps({"active": 5, "layers_to_transform": "all"}))
    assert main(["plan", str(tmp_path), "--config", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()[1:-1]
    assert len(lines) == model.config.num_hidden_layers
    for number, line in enumerate(lines):
        name, neurons, active, _, width = line.split()
        assert name == f"model.layers.{number}.mlp"
        assert (int(neurons), int(active), int(width)) == (model.config.intermediate_size, 5, model.config.hidden_size)


def test_saving_without_planning_is_a_wrong_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path), "--save", str(tmp_path / "plan.json")])
    assert "--save needs --data" in capsys.readouterr().err


def test_plan_leaves_out_excluded_modules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("t5").save_pretrained(tmp_path)
    (tmp_path / "settings.json").write_text('{"exclude_modules": ["decoder"]}')
    assert main(["plan", str(tmp_path), "--config", str(tmp_path / "settings.json")]) == 0
    lines = capsys.readouterr().out.splitlines()[1:-1]
    assert lines and all(line.startswith("encoder.") for line in lines)


@pytest.mark.parametrize("settings", ['{"rnak": 3}', '{"active": 100000}', "not json"])
def test_plan_reports_bad_settings_in_one_line(
    tmp_path: Path, settings: str, capsys: pytest.CaptureFixture[str]
) -> None:
    build("gpt2").config.save_pretrained(tmp_path)
    config = tmp_path / "settings.json"
    config.write_text(settings)
    assert main(["plan", str(tmp_path), "--config", str(config)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hf-subquad: ") and error.count("\n") == 1
