"""The page on reliability is true: every number of the catalogue is there once, and every test that it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text("utf-8")
ROWS = re.findall(r"^\| (R\d{3}) \| (.+?) \| (.+?) \| (.+) \|$", PAGE, re.MULTILINE)
NAMED = sorted(set(re.findall(r"tests/[\w/]+\.py(?:::\w+)?", PAGE)))


def functions_of(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)}


def test_every_number_of_the_catalogue_has_one_row() -> None:
    assert [number for number, *_ in ROWS] == [f"R{number:03}" for number in range(1, 179)]


@pytest.mark.parametrize("named", NAMED)
def test_every_test_that_is_named_is_there(named: str) -> None:
    file, _, function = named.partition("::")
    assert (ROOT / file).is_file()
    assert not function or function in functions_of(ROOT / file)


@pytest.mark.parametrize(("number", "what", "code", "shown"), ROWS, ids=[number for number, *_ in ROWS])
def test_a_row_names_a_test_that_bears_its_number_or_says_why_not(
    number: str, what: str, code: str, shown: str
) -> None:
    assert what.strip()
    tests = re.findall(r"tests/[\w/]+\.py", shown)
    if code == "-" and not tests:
        assert len(shown.split()) >= 4, "a reason in a sentence"
        return
    assert tests
    # The number is in the file, in a name, a parameter or a docstring, so that who reads the one finds the other.
    assert any(re.search(number, (ROOT / file).read_text("utf-8"), re.IGNORECASE) for file in tests), shown
