"""Bad files, each named after what is wrong with it: what they come to, and that they show every refusal there is.

The corpus is `tests/corpus/PARSER/DEFECT`; `expected.yaml` in it is the table. It is what fuzzing starts from, and what
every fault that fuzzing finds is added to.
"""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import error_sites
import fuzz_targets
import pytest
import tiny
import yaml
from fuzz_worlds import CORPUS

from lora_cli.errors import LoraCliError

EXPECTED: Mapping[str, Mapping[str, str | int]] = yaml.safe_load((CORPUS / "expected.yaml").read_text("utf-8"))
FILES = [(target, name) for target, files in EXPECTED.items() for name in files]
SECONDS, MEMORY, BYTES = 5, 64 << 20, 1 << 20

OF_WRITERS = "what is being written, not a file that is read"
LONG_FILE = "no file of the corpus is so long; readers of files stop at the same limit before"
UNREACHED = {
    "checkpoint/header.py render_header": OF_WRITERS,
    "checkpoint/manifest.py write_manifest": OF_WRITERS,
    "checkpoint/undo_file.py _packed": OF_WRITERS,
    "arithmetic/fragments.py FragmentWriter.add": OF_WRITERS,
    "arithmetic/residual.py _check": OF_WRITERS,
    "adapters/patterns.py compile_user_pattern": "what a person types; patterns of files are compiled otherwise",
    "surgery/receipt.py _read_at": "a disk that fails, whatever is in the file",
    "adapters/names.py Table.__post_init__": "tables are made by code, of no file",
    "checkpoint/strict_json.py loads: f'The {what} is too long'": LONG_FILE,
    "checkpoint/strict_yaml.py loads: f'The {what} is too long'": LONG_FILE,
    "surgery/card.py _text: f'it is longer than {_CARD_LIMIT} bytes'": "a card of more than 1 MiB",
    "surgery/card.py _read: f'its metadata is longer than {_METADATA_LIMIT} characters'": "metadata of 256 KiB",
    "checkpoint/undo_file.py _read: _DAMAGED, f'{part.key}: a small part'": "a part of more than 64 MiB",
    "adapters/target_files.py patterns: 'There are too many patterns'": "ten thousand patterns",
}
"""Refusals that no file of the corpus meets, by how their names begin, each with the reason."""

ALIKE = {
    "_TOO_DEEP": "Python's parser may give up before our own count does: one limit",
}
"""What several refusals say, each with the reason."""


def text_of(error: LoraCliError) -> str:
    said = (error.message, error.file, error.tensor, error.expected, error.found, *error.details)
    return "\n".join(part for part in said if part).replace("\n", " ")


@pytest.mark.parametrize(("target", "name"), FILES, ids=[f"{target}-{name}" for target, name in FILES])
def test_a_file_comes_to_what_its_table_says(target: str, name: str) -> None:
    said = EXPECTED[target][name]
    code, _, words = str(said).partition(" ")
    data = (CORPUS / target / name).read_bytes()
    tracemalloc.start()
    try:
        with tiny.within(SECONDS):
            refusal = fuzz_targets.outcome(target, data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY
    assert name.startswith("good-") == (said == 0)
    assert (refusal.exit_code if refusal else 0) == int(code), refusal
    assert refusal is None or all(word in text_of(refusal) for word in words.split("|")), text_of(refusal)
    assert (refusal is None) == (not words)


def test_the_table_lists_every_file_and_the_corpus_is_small() -> None:
    folders = {target: {path.name for path in (CORPUS / target).iterdir()} for target in fuzz_targets.TARGETS}
    assert folders == {target: set(files) for target, files in EXPECTED.items()}
    others = {path.name for path in CORPUS.iterdir()} - folders.keys()
    assert others == {"expected.yaml", "undo-world"}
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < BYTES


@pytest.fixture(scope="module")
def reached() -> set[tuple[str, int]]:
    """Lines of the parsers that run while the corpus is read."""
    with error_sites.recorded() as lines:
        for target, name in FILES:
            fuzz_targets.outcome(target, (CORPUS / target / name).read_bytes())
    return lines


def test_every_refusal_of_the_parsers_is_shown_by_a_file(reached: set[tuple[str, int]]) -> None:
    """Whoever adds one adds a file for it."""
    missed = [site.name for site in error_sites.sites() if not site.was_reached(reached)]
    unexpected = [name for name in missed if not name.startswith(tuple(UNREACHED))]
    assert unexpected == []
    assert [start for start in UNREACHED if not any(name.startswith(start) for name in missed)] == []


def test_a_refusal_that_nothing_reaches_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The law above can fail: of two refusals in a module, only one is met."""
    source = 'def read(data):\n    if data:\n        raise ValueError("not empty")\n    raise ValueError("empty")\n'
    (tmp_path / "parser.py").write_text(source)
    monkeypatch.setattr(error_sites, "PACKAGE", tmp_path)
    space: dict[str, Any] = {}
    exec(compile(source, str(tmp_path / "parser.py"), "exec"), space)  # noqa: S102 (the text above)
    with error_sites.recorded(["parser.py"]) as lines, pytest.raises(ValueError, match="not empty"):
        space["read"](b"x")
    missed = [site.name for site in error_sites.sites(["parser.py"]) if not site.was_reached(lines)]
    assert missed == ["parser.py read: 'empty'"]


def test_different_refusals_say_different_things() -> None:
    """By what they say a report can be traced to the one line that said it."""
    said = Counter(site.words for site in error_sites.sites() if site.words)
    assert {words for words, count in said.items() if count > 1} == set(ALIKE)
