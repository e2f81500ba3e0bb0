"""The page on the systems that this one grew from: its rows name things that exist, and tests that show them."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "origins.md").read_text("utf-8")
REFERENCE = (ROOT / "docs" / "cli.md").read_text("utf-8")
SYSTEMS = {
    "LoRA as functions on pytrees": 14,
    "LoRA as a weight parametrization": 16,
    "Edifice (Axon, Elixir)": 19,
    "d9d's peft.lora": 30,
    "LoRA from scratch (a tutorial's chapter with PyTorch code)": 118,
}
"""The sections of the page, and how many rows each has at least: none is to be lost without a word."""
HEAD = ["| there | here | shown by |", "|---|---|---|"]
CODE = re.compile(r"`([^`]+)`")
PLACES = ("lora_cli.", "lora-cli ", "scripts/")


def tables() -> dict[str, list[str]]:
    """The lines of each section's table, without its head."""
    found = {}
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        heading, *lines = section.splitlines()
        table = [line for line in lines if line.startswith("|")]
        assert table[:2] == HEAD, heading
        found[heading] = table[2:]
    return found


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


ROWS = [cells(line) for table in tables().values() for line in table]


# What a cell names


def find(name: str) -> None:
    """Look a dotted name up through modules, attributes, and fields of classes; `f(x=)` is a parameter of f."""
    dotted, bracket, parameter = name.removesuffix("=)").partition("(")
    found: Any = importlib.import_module("lora_cli")
    seen = "lora_cli"
    for part in dotted.split(".")[1:]:
        seen = f"{seen}.{part}"
        if hasattr(found, part):
            found = getattr(found, part)
        elif inspect.isclass(found):
            assert part in fields_of(found), seen
            found = None
        else:
            found = importlib.import_module(seen)
    if bracket:
        assert parameter in inspect.signature(found).parameters, name


def fields_of(cls: type) -> frozenset[str]:
    """What objects of a class have: annotated in it or in what it descends from, or set by a method."""
    own = [kind for kind in cls.__mro__ if kind.__module__.startswith("lora_cli.")]
    return frozenset(name for kind in own for name in (*inspect.get_annotations(kind), *set_by_methods(kind)))


def set_by_methods(cls: type) -> Iterator[str]:
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls)))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def options_of(command: str) -> set[str]:
    """The options that the reference lists for a command; text that mentions others does not count."""
    _, heading, section = REFERENCE.partition(f"\n## lora-cli {command}\n")
    assert heading, command
    lines = re.findall(r"^│ +(-.*?)(?= +[^-\s])", section.partition("\n## ")[0], re.MULTILINE)
    return {option for line in lines for option in line.split()}


@cache
def functions_of(file: str) -> frozenset[str]:
    """Names of the tests that pytest finds in a file."""
    path = ROOT / file
    assert path.parts[len(ROOT.parts)] == "tests"
    assert path.name.startswith("test_")
    tree = ast.parse(path.read_text("utf-8"))
    return frozenset(n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


def check_place(place: str) -> None:
    if place.startswith("lora_cli."):
        find(place)
    elif place.startswith("scripts/"):
        assert (ROOT / place).is_file()
    else:
        command, *options = place.removeprefix("lora-cli ").split()
        assert set(options) <= options_of(command)


def check_test(test: str) -> None:
    file, _, function = test.partition("::")
    assert function in functions_of(file), test


# The page


def test_the_page_has_the_five_systems_and_no_row_is_lost() -> None:
    found = tables()
    assert list(found) == list(SYSTEMS)
    assert {heading: len(table) for heading, table in found.items() if len(table) < SYSTEMS[heading]} == {}
    assert all(len(row) == 3 and all(row) for row in ROWS)
    there = [row[0] for row in ROWS]
    assert sorted(there) == sorted(set(there))


@pytest.mark.parametrize(("there", "here", "shown"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_names_what_exists_and_tests_that_show_it(there: str, here: str, shown: str) -> None:
    places = [code for code in CODE.findall(here) if code.startswith(PLACES)]
    assert places, "nothing says where it is"
    for place in places:
        check_place(place)
    tests = CODE.findall(shown)
    assert tests, "nothing shows it"
    assert CODE.sub("", shown).strip(", ") == ""
    for test in tests:
        check_test(test)


@pytest.mark.parametrize(
    "place",
    [
        "lora_cli.nn.nothing",
        "lora_cli.nothing.inject",
        "lora_cli.nn.LoRALinear.nothing",
        "lora_cli.nn.LoRAConfig.lora_alpha",
        "lora_cli.nn.inject(nothing=)",
        "lora-cli nothing",
        "lora-cli merge --nothing",
        "lora-cli merge --init",
        "lora-cli merge --tok",
        "scripts/nothing",
    ],
)
def test_what_does_not_exist_is_not_found(place: str) -> None:
    with pytest.raises((AssertionError, ImportError)):
        check_place(place)


@pytest.mark.parametrize(
    "test", ["tests/test_origins.py::test_nothing", "tests/test_origins.py", "tests/test_origins.py::check_test"]
)
def test_tests_that_do_not_exist_are_not_found(test: str) -> None:
    with pytest.raises(AssertionError):
        check_test(test)
