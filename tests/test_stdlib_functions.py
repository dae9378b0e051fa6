"""The classification task from the standard library: is it fair, and the same every time?"""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import stdlib_functions
from stdlib_functions import Function


@pytest.fixture(scope="module")
def functions() -> list[Function]:
    """Of every third file: parsing the whole library takes seconds."""
    files = [*stdlib_functions.standard_library_files()]
    some = [path for number, path in enumerate(files) if number % 3 == 0 or path.name == "textwrap.py"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stdlib_functions, "standard_library_files", lambda: iter(some))
        return list(stdlib_functions.standard_library_functions())


@pytest.fixture(autouse=True)
def read_once(monkeypatch: pytest.MonkeyPatch, functions: list[Function]) -> None:
    monkeypatch.setattr(stdlib_functions, "standard_library_functions", lambda: iter(functions))


def test_functions_come_whole_and_once(functions: list[Function]) -> None:
    sources = {name: text for name, text, module in functions if module == "textwrap"}
    assert sources["dedent"].startswith("def dedent(text):\n") and sources["dedent"].endswith("return text")
    assert "_munge_whitespace" in sources  # a method, without the indentation of its class
    assert all(not line.startswith(" ") for line in (text.split("\n")[0] for text in sources.values()))
    assert "prefixed_lines" not in sources and "def prefixed_lines" in sources["indent"]  # nested


def test_files_are_written_with_rows_of_both_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stdlib_functions.main(["--out", str(tmp_path / "new" / "folder"), "--max-per-label", "20"]) == 0
    files = {name: tmp_path / "new" / "folder" / f"{name}.jsonl" for name in ("train", "test")}
    rows = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in files.items()}
    counts = Counter(row["label"] for part in rows.values() for row in part)
    assert set(counts.values()) == {20} and len(counts) == stdlib_functions.MODULES
    assert all(row.keys() == {"text", "label"} for part in rows.values() for row in part)
    assert 0.15 < len(rows["test"]) / counts.total() < 0.35
    assert f"{files['train']}: {len(rows['train'])} functions" in capsys.readouterr().out


@pytest.mark.parametrize("limits", [{}, {"min_chars": 500, "max_chars": 1500}])
def test_no_text_gives_the_label_away_or_is_on_both_sides(limits: dict[str, int]) -> None:
    train, test = stdlib_functions.make_rows(max_per_label=10**6, **limits)
    assert all(500 <= len(row["text"]) <= 1500 for row in [*train, *test] if limits)
    labels = {row["label"] for row in train}
    assert labels == {row["label"] for row in test}
    words = "|".join(label.strip("_") for label in labels)
    named = re.compile(rf"(?<![A-Za-z0-9])({words})(?![A-Za-z0-9])", re.IGNORECASE)
    assert not any(named.search(row["text"]) for row in [*train, *test])
    assert not {_essence(row["text"]) for row in train} & {_essence(row["text"]) for row in test}


def test_a_text_of_two_modules_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    body = "(self):\n    import {}\n    return 1"
    made = [
        Function("one", "def one" + body.format("left"), "left"),
        Function("two", "def two" + body.format("right").replace("    ", "\t"), "right"),
        Function("three", "def three():\n    x = 1\n    return left_of.Left.lefty", "left"),
        Function("four", "def four():\n    x = 1\n    return left_of.Left.lefty", "left"),
    ]
    monkeypatch.setattr(stdlib_functions, "standard_library_functions", lambda: iter(made))
    train, test = stdlib_functions.make_rows(max_per_label=10)
    assert [*train, *test] == [{"text": "def three():\n    x = 1\n    return module_of.module.lefty", "label": "left"}]


def test_the_limit_is_a_share_of_the_same_rows() -> None:
    few, more = (stdlib_functions.make_rows(max_per_label=n) for n in (10, 50))
    for part in (0, 1):
        assert [row for row in more[part] if row in few[part]] == few[part]


def test_long_texts_are_cut_at_a_line() -> None:
    text = "def f():\n    a = 1\n    return a"
    cut = {limit: stdlib_functions._whole_lines(text, limit) for limit in (None, 31, 29, 18, 17, 5)}
    assert cut[None] == cut[31] == text
    assert cut[29] == cut[18] == "def f():\n    a = 1" and cut[17] == "def f():" and cut[5] == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-per-label", "0"], "--max-per-label must be at least 1, got 0"),
        (["--min-chars", "9", "--max-chars", "9"], r"--max-chars must exceed --min-chars (9), got 9"),
    ],
)
def test_a_limit_of_none_is_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        stdlib_functions.main(["--out", str(tmp_path), *options])
    assert message in capsys.readouterr().err


def _essence(text: str) -> str:
    return " ".join(re.sub(r"\bdef\s+\w+", "def _", text, count=1).split())
