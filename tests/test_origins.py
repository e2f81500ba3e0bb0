"""The page on the systems that this one grew from: its rows name things that exist, and tests that show them."""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "origins.md").read_text("utf-8")
REFERENCE = (ROOT / "docs" / "cli.md").read_text("utf-8")
ROW = re.compile(r"^\| (?P<there>.+?) \| (?P<here>.+?) \| (?P<shown>.+?) \|$", re.MULTILINE)
ROWS = [m.groups() for m in ROW.finditer(PAGE) if m["there"] != "there" and not set(m["there"]) <= set("- ")]
CODE = re.compile(r"`([^`]+)`")


def codes(cell: str) -> list[str]:
    return CODE.findall(cell)


def find(name: str) -> object:
    """What a dotted name means, through modules and then attributes; annotated fields of a class count."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            fields = getattr(found, "__annotations__", {}) if isinstance(found, type) else {}
            found = fields[part] if part in fields and not hasattr(found, part) else getattr(found, part)
        return found
    raise LookupError(name)


@cache
def functions_of(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_the_page_has_the_five_systems() -> None:
    assert len(re.findall(r"^## ", PAGE, re.MULTILINE)) >= 5
    assert len(ROWS) > 80
    assert len({there for there, _, _ in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("there", "here", "shown"), ROWS, ids=[there for there, _, _ in ROWS])
def test_a_row_names_what_exists_and_tests_that_show_it(there: str, here: str, shown: str) -> None:
    places = [code for code in codes(here) if code.startswith(("lora_cli.", "lora-cli ", "scripts/"))]
    assert places, "nothing says where it is"
    for place in places:
        if place.startswith("lora_cli."):
            assert find(place) is not None
        elif place.startswith("scripts/"):
            assert (ROOT / place.split()[0]).exists()
        else:
            command, *options = place.removeprefix("lora-cli ").split()
            section = REFERENCE.split(f"lora-cli {command}`", 1)[1].split("\n## ")[0]
            assert all(option in section for option in options if option.startswith("--"))
    tests = codes(shown)
    assert tests, "nothing shows it"
    for test in tests:
        file, _, function = test.partition("::")
        assert function in functions_of(file), test
        assert function.startswith("test_")
