"""Where the parsers refuse: every statement that makes or raises an error, by their source; and which are reached."""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final

import lora_cli

PACKAGE: Final = Path(lora_cli.__file__).parent

PARSERS: Final = (
    *("checkpoint/header.py", "checkpoint/entries.py", "checkpoint/strict_json.py", "checkpoint/strict_yaml.py"),
    *("checkpoint/index.py", "checkpoint/manifest.py", "checkpoint/undo_file.py", "checkpoint/journal.py", "regex.py"),
    *("adapters/peft_config.py", "adapters/peft_types.py", "adapters/patterns.py", "adapters/target_files.py"),
    *("adapters/names.py", "adapters/resolve.py", "adapters/wrapped.py", "adapters/wrap_file.py"),
    *("adapters/formats/plain.py", "surgery/receipt.py", "surgery/card.py", "surgery/undo/terms.py"),
    *("surgery/undo/undoing.py", "surgery/undo/given.py", "surgery/undo/places.py"),
    *("arithmetic/fragments.py", "arithmetic/packing.py", "arithmetic/residual.py", "arithmetic/zstd.py"),
)
"""Modules that read what nobody vouches for."""

_MAKERS: Final = {"_expect", "_malformed", "malformed", "truncated", "repeated", "damaged"}
"""Functions of theirs that make an error of what they are told."""


@dataclass(frozen=True, order=True)
class Site:
    """A statement that raises an error, or returns one that is raised elsewhere.

    Attributes:
        file: Module, below the package.
        lines: First and last line.
        function: The function it is in, with its class.
        words: What it says, as it is written there; empty where it passes on what others say.
    """

    file: str
    lines: tuple[int, int]
    function: str
    words: str

    @property
    def name(self) -> str:
        """What it is called wherever lines move."""
        return f"{self.file} {self.function}: {self.words}"

    def was_reached(self, lines: Collection[tuple[str, int]]) -> bool:
        """Whether one of these (module, line) is its own."""
        first, last = self.lines
        return any((self.file, line) in lines for line in range(first, last + 1))


def sites(files: Sequence[str] = PARSERS) -> list[Site]:
    """Every site of these modules."""
    return [site for file in files for site in _sites_in(file, (PACKAGE / file).read_text("utf-8"))]


def _sites_in(file: str, text: str) -> Iterator[Site]:
    tree = ast.parse(text)
    ours = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for function, node in _statements(tree, ()):
        made = node.exc if isinstance(node, ast.Raise) else node.value
        if isinstance(made, ast.Call) and (isinstance(node, ast.Raise) or _is_error(made)):
            words = [] if function[-1] in _MAKERS else [*_said_by(made, ours), *_words(made)]
            yield Site(file, (node.lineno, node.end_lineno or node.lineno), ".".join(function), ", ".join(words))


def _said_by(call: ast.Call, ours: Mapping[str, ast.FunctionDef]) -> list[str]:
    """What a function of the module that makes all its errors always says."""
    maker = ours.get(call.func.id) if isinstance(call.func, ast.Name) and call.func.id in _MAKERS else None
    made = maker.body[-1] if maker else None
    return list(_words(made.value)) if isinstance(made, ast.Return) and isinstance(made.value, ast.Call) else []


def _statements(node: ast.AST, function: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ast.Raise | ast.Return]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise | ast.Return):
            yield function, child
        inner = (*function, child.name) if isinstance(child, ast.FunctionDef | ast.ClassDef) else function
        yield from _statements(child, inner)


def _is_error(call: ast.Call) -> bool:
    """Whether a call makes an error: by its class, or by one of the functions that parsers have for that."""
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    return name.endswith("Error") or name in _MAKERS


def _words(call: ast.Call) -> Iterator[str]:
    """What tells an error from another: its texts, but neither file nor hint nor the values that it names."""
    shown = [*call.args, *(word.value for word in call.keywords if word.arg in ("expected", "found", "details"))]
    return (ast.unparse(node) for node in shown if _is_text(node))


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.Name):
        return node.id.startswith("_") and node.id.isupper()
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    texts = [str(part.value) for part in parts if isinstance(part, ast.Constant)]
    return any(character.isalpha() for character in "".join(texts))


@contextmanager
def recorded(files: Sequence[str] = PARSERS) -> Iterator[set[tuple[str, int]]]:
    """Record which lines of these modules run: (module, line)."""
    names = {str(PACKAGE / file): file for file in files}
    reached: set[tuple[str, int]] = set()
    known: dict[CodeType, Any] = {}

    def entered(frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if code not in known:
            file = names.get(code.co_filename)
            known[code] = _line_of(file, reached) if file else None
        return known[code]

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        yield reached
    finally:
        sys.settrace(before)


def _line_of(file: str, reached: set[tuple[str, int]]) -> Any:
    def run(frame: FrameType, event: str, argument: object) -> Any:
        reached.add((file, frame.f_lineno))
        return run

    return run
