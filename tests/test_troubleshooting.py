"""docs/troubleshooting.md lists every error and warning that the source can give, and none that it cannot."""

import ast
import re
from pathlib import Path

import hf_subquad
from hf_subquad import SubquadError

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ERRORS = {name for name, kind in vars(hf_subquad).items() if isinstance(kind, type) and issubclass(kind, SubquadError)}


def words(message: ast.expr) -> str:
    """A message as the page writes it, with … for what is filled in."""
    if isinstance(message, ast.JoinedStr):
        return "".join(words(part) for part in message.values)
    return str(message.value) if isinstance(message, ast.Constant) else "…"


def messages() -> set[tuple[str, str]]:
    """(error class or 'Warnings', message) of every place in the source that gives one."""
    found = set()
    library = ROOT / "hf_subquad"
    for path in (path for path in library.rglob("*.py") if "theory" not in path.parts):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in ERRORS:
                found.add((ast.unparse(node.func), words(node.args[0])))
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.args
                and "warn" in node.func.attr
            ):
                found.add(("Warnings", words(node.args[0])))
    return {(kind, text) for kind, text in found if kind in ERRORS | {"Warnings"} and re.search("[a-z]", text)}


def listed() -> list[tuple[set[str], str]]:
    """(classes that a section is about, start of a message) of every row of the page."""
    rows = []
    for section in PAGE.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        kinds = set(re.findall(r"`(\w+)`", title)) or {title}
        rows += [(kinds, start) for start in re.findall(r"^\| `(.+?)` \|", body, re.MULTILINE)]
    return rows


def test_every_message_has_a_row() -> None:
    rows, given = listed(), messages()
    assert len(given) > 60
    assert not {
        (kind, text) for kind, text in given if not any(kind in kinds and text.startswith(s) for kinds, s in rows)
    }


def test_every_row_is_a_message() -> None:
    given = messages()
    assert not [s for kinds, s in listed() if not any(kind in kinds and text.startswith(s) for kind, text in given)]


def test_every_error_is_there_and_has_a_section() -> None:
    raised, described = {kind for kind, _ in messages()}, set().union(*(kinds for kinds, _ in listed()))
    assert ERRORS | {"Warnings"} == raised == described
    assert all(row.count(" | ") == 2 for row in re.findall(r"^\| `.*", PAGE, re.MULTILINE))
