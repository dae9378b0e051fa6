"""A task from text that every Python installation carries: which module is a function from?

    python recipes/stdlib_functions.py --out out/stdlib-functions      # writes train.jsonl and test.jsonl there
    python recipes/stdlib_functions.py --out out/stdlib-prompts --max-per-label 1000 --min-chars 500 --max-chars 1500

The first is for classifiers; the second makes long prompts with short answers for language models.

A row is {"text": source of a function, "label": top-level package or module}; rows come in an order that is as good
as random, so the first rows of a file are a fair sample. The same Python gives the same files; another version of
Python has other functions. The rules:

- Functions and methods of at least three lines; what is nested in a function is part of its text only, so that no text
  is inside another one.
- The modules' names are replaced by the word "module" wherever they stand as words in a text, whatever their case and
  whichever module the text is from: otherwise `import tkinter` says it all, and a name that is left in says what the
  label is not.
- Texts that are equal but for white space and the function's own name count once, and not at all if they are in more
  than one module. So no text of test.jsonl is in train.jsonl. Methods of one class are in both: the question is where
  a function is from, in a library of which the other functions are known.
"""

import argparse
import ast
import hashlib
import json
import re
import sys
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# Tests are repetitive, `encodings` is mostly tables, `pydoc_data` is prose.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "__pycache__"}
)
MODULES = 16
MIN_LINES = 3
TEST_ONE_IN = 4  # a larger share than usual, so that a point of accuracy is a dozen functions
MASK = "module"


class Function(NamedTuple):
    name: str
    text: str
    module: str


def standard_library_files() -> Iterator[Path]:
    """Paths of the standard library's own modules, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        # `_sysconfigdata*` holds the paths of the machine that Python was built on.
        if not SKIPPED_FOLDERS.intersection(parts) and not path.name.startswith("_sysconfigdata"):
            yield path


def standard_library_functions() -> Iterator[Function]:
    """Functions of at least MIN_LINES lines, decorators included, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in standard_library_files():
        source = path.read_text(encoding="utf-8", errors="replace")
        # Not str.splitlines, which also splits at form feeds; the parser does not.
        lines = source.split("\n")
        module = path.relative_to(root).parts[0].removesuffix(".py")
        for node in _outermost_functions(ast.parse(source)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if node.end_lineno - node.lineno + 1 >= MIN_LINES:
                text = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
                yield Function(node.name, text, module)


def make_rows(
    max_per_label: int, min_chars: int = 0, max_chars: int | None = None
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows to train on and rows to test on, of the MODULES modules with most functions.

    Args:
        max_per_label: functions of a module, at most.
        min_chars: shorter texts are left out.
        max_chars: longer texts are cut after their last whole line within it.
    """
    functions = list(standard_library_functions())
    labels = [module for module, _ in Counter(function.module for function in functions).most_common(MODULES)]
    names = _words(labels)
    modules_of: dict[str, set[str]] = {}
    rows: dict[str, dict[str, str]] = {}
    for name, text, module in functions:
        if module in labels:
            text = _whole_lines(names.sub(MASK, text), max_chars)
            if len(text) < min_chars:
                continue
            digest = _digest(name, text)
            modules_of.setdefault(digest, set()).add(module)
            rows.setdefault(digest, {"text": text, "label": module})
    taken: Counter[str] = Counter()
    train, test = [], []
    for digest in sorted(rows):
        row = rows[digest]
        if len(modules_of[digest]) > 1 or taken[row["label"]] == max_per_label:
            continue
        taken[row["label"]] += 1
        # By the last digits: the first ones decide the order, hence what is within the limit.
        (train if int(digest[-8:], 16) % TEST_ONE_IN else test).append(row)
    return train, test


def _outermost_functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from _outermost_functions(child)


def _whole_lines(text: str, max_chars: int | None) -> str:
    if max_chars is None or len(text) <= max_chars:
        return text
    return text[: max(text.rfind("\n", 0, max_chars + 1), 0)]


def _words(labels: Sequence[str]) -> re.Pattern[str]:
    """Matches the modules' names as words, `_` being a space; `_pydecimal` goes by `decimal` too."""
    words = {name for label in labels for name in (label.strip("_"), label.removeprefix("_py").strip("_"))}
    alternatives = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.compile(rf"(?<![A-Za-z0-9])({alternatives})(?![A-Za-z0-9])", re.IGNORECASE)


def _digest(name: str, text: str) -> str:
    """The same for texts that differ in white space and the function's own name only."""
    anonymous = re.sub(rf"\bdef\s+{re.escape(name)}\b", "def _", text, count=1)
    return hashlib.sha256(" ".join(anonymous.split()).encode()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--max-per-label", type=int, default=400, metavar="N", help="functions of a module, at most")
    parser.add_argument("--min-chars", type=int, default=0, metavar="N", help="leave shorter functions out")
    parser.add_argument("--max-chars", type=int, metavar="N", help="cut longer functions, at the end of a line")
    options = parser.parse_args(argv)
    if options.max_per_label < 1:
        parser.error(f"--max-per-label must be at least 1, got {options.max_per_label}")
    if options.max_chars is not None and options.max_chars <= options.min_chars:
        parser.error(f"--max-chars must exceed --min-chars ({options.min_chars}), got {options.max_chars}")
    options.out.mkdir(parents=True, exist_ok=True)
    parts = make_rows(options.max_per_label, options.min_chars, options.max_chars)
    for name, rows in zip(("train", "test"), parts, strict=True):
        path = options.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        counts = Counter(row["label"] for row in rows).most_common()
        print(f"{path}: {len(rows)} functions: {', '.join(f'{label} {count}' for label, count in counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
