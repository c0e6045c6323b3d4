"""`SPECIFICATION.md` against the tests that it names."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "SPECIFICATION.md").read_text()

ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in TEXT.splitlines() if line.startswith("| ")
]
PROMISES = [row for row in ROWS if row[0].isdigit()]

NAMED = re.findall(r"`(tests/[^`:]+)::([\w:]+)`", TEXT)


@functools.cache
def names_in(path: str) -> set[str]:
    """What pytest takes behind a module's path: functions, and methods with their class."""
    found: set[str] = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            parts = [part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
            found |= {f"{node.name}::{part.name}" for part in parts}
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED)))
def test_each_named_test_is_there(path: str, name: str) -> None:
    assert name.lower().startswith("test")
    assert name in names_in(path)


def test_a_method_is_named_with_its_class() -> None:
    """Without, pytest finds none, and there may be two."""
    assert "TestOnAMount::test_written_ram_is_refused" in names_in("tests/vm/test_identity.py")
    assert "test_written_ram_is_refused" not in names_in("tests/vm/test_identity.py")


def test_each_promise_has_a_number_of_its_own_and_a_test_or_says_that_it_has_none() -> None:
    numbers = [int(row[0]) for row in PROMISES]
    assert len(numbers) > 40
    assert numbers == sorted(set(numbers))
    named = r"`tests/[^`]+::[\w:]+`"
    for number, promise, tests in PROMISES:
        assert promise.endswith("."), number
        assert tests == "test pending" or re.fullmatch(f"{named}(, {named})*", tests), number
