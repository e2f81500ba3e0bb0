"""Text that came from a file is made harmless before a terminal sees it, and stays exact in JSON (R139 to R142)."""

from __future__ import annotations

import io
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from cli_world import Call, Ran, World, call_fixture, world_fixture  # noqa: F401 (fixtures)
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from tiny import PREFIX, Array, numbers, write_adapter, write_base, write_json

from lora_cli.cli.draw import line
from lora_cli.cli.text import LONGEST, count, duration, number, parse_size, shown, size

INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
COMBINING = {"Mn", "Me", "Mc"}
BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0" + "".join(
    map(chr, (*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)))
)
"""Letters and marks that Unicode wants to be drawn as nothing (Default_Ignorable_Code_Point)."""
HOSTILE = {
    "clear screen": "\x1b[2J\x1b[H",
    "window title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil\x1b\\here\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "C1": "\x9b31mred\x9d0;x\x9c",
    "bell and backspaces": "safe\x07\x08\x08\x08\x08evil",
    "return": "shown\rhidden",
    "lines": "one\ntwo\x0b\x0cthree\u2028four\u2029five\x85six",
    "tab and nul": "a\tb\0c\x7f",
    "bidi override": "\u202egnp.\u202cexe",
    "bidi isolate": "\u2066a\u2069\u200f\u061c",
    "zero width": "a\u200bb\u200d\u2060\ufeffc",
    "combining storm": "Z" + "\u0301\u0327\u20dd" * 30,
    "unseen letters and marks": "a\ufe0fb\u3164c\U000e0101d\u034fe\u180b",
    "private and unassigned": "\ue000\U000e0001\U000e0041\uffff",
    "markup": "[red]x[/red]",
    "closing markup": "[/x]",
    "link markup": "[link=http://evil]x[/link]",
    "brackets": "[[\\[bold]]",
    "emoji code": ":smile:",
    "spreadsheet": "=cmd()",
}
everything = st.text(st.characters(codec=None, categories=None)) | st.sampled_from(list(HOSTILE.values()))


def combining(text: str) -> int:
    """Most combining characters in a row."""
    most = run = 0
    for character in text:
        run = run + 1 if unicodedata.category(character) in COMBINING else 0
        most = max(most, run)
    return most


def assert_harmless(text: str) -> None:
    lines = text.split("\n")
    steering = {c for one in lines for c in one if unicodedata.category(c) in INVISIBLE or c in BLANK}
    assert steering == set()
    assert max(map(combining, lines)) <= 4


@given(everything, st.integers(2, 400))
@example("x" * 1000, LONGEST)
@example("\x1b" * 1000, LONGEST)
@example("é" * LONGEST + "\x1b", LONGEST)
def test_shown_text_cannot_steer_a_terminal(text: str, limit: int) -> None:
    safe = shown(text, limit)
    assert_harmless(safe)
    assert "\n" not in safe
    assert len(safe) <= limit
    assert shown(safe, limit) == safe
    assert bool(safe) == bool(text)
    safe.encode()


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=LONGEST))
def test_plain_ascii_is_shown_as_it_is(text: str) -> None:
    assert shown(text) == text


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"], exclude_characters=BLANK), max_size=LONGEST))
def test_letters_of_every_script_are_shown_as_they_are(text: str) -> None:
    assert shown(text) == text


def test_names_that_differ_by_what_nobody_sees_look_different() -> None:
    for character in BLANK:
        assert shown(f"a{character}b") == f"a{character.encode('ascii', 'backslashreplace').decode()}b"


@given(everything)
def test_a_line_prints_its_text_literally(text: str) -> None:
    """Neither Rich's markup, nor its emoji codes, nor its control codes."""
    stream = io.StringIO()
    Console(file=stream, width=10_000, highlight=False, markup=False, emoji=False).print(line(text), soft_wrap=True)
    assert stream.getvalue() == shown(text, 1000) + "\n"


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "None"), (3, "3"), (Path("a\x1bb"), "a\\x1bb"), (b"\x1b", "b'\\x1b'")]
)
def test_anything_can_be_shown(value: object, expected: str) -> None:
    assert shown(value) == expected


# Through the real commands


NAMES = list(HOSTILE.values())


def hostile_base(folder: Path) -> Path:
    config = {"architectures": [HOSTILE["window title"]], "model_type": HOSTILE["markup"]}
    return write_base(folder, {f"{name}.weight": numbers(3, 2) for name in NAMES}, shards=1, config=config)


def hostile_adapter(folder: Path, prefix: str = "") -> Path:
    tensors: dict[str, Array] = {}
    for name in NAMES:
        tensors[f"{PREFIX}{prefix}{name}.lora_A.weight"] = np.ones((2, 2), np.float32)
        tensors[f"{PREFIX}{prefix}{name}.lora_B.weight"] = np.ones((3, 2), np.float32)
    return write_adapter(folder, tensors, base_model_name_or_path=HOSTILE["clear screen"])


def assert_names(ran: Ran, where: str, *, code: int = 0, limit: int = 1000) -> None:
    assert ran.code == code, ran.err
    assert_harmless(ran.out)
    assert_harmless(ran.err)
    missing = [name for name in NAMES if shown(name, limit) not in where]
    assert missing == []


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch, call: Call) -> Call:
    monkeypatch.setenv("COLUMNS", "1000")  # names are not folded
    return call


def test_hostile_names_in_results(wide: Call, tmp_path: Path) -> None:
    base, adapter = hostile_base(tmp_path / "base"), hostile_adapter(tmp_path / "adapter")
    for ran in (
        wide("inspect", base, "-v"),
        wide("inspect", adapter, "-v"),
        wide("inspect", adapter, "--base", base, "-v"),
        wide("merge", base, adapter, "--dry-run"),
        wide("verify", base, "--base", base, "--adapter", adapter),
    ):
        assert_names(ran, ran.out, code=ran.code)
    made_for = wide("inspect", adapter).out
    assert shown(HOSTILE["clear screen"]) in made_for
    assert shown(HOSTILE["window title"]) in wide("inspect", base).out
    assert wide("merge", base, adapter, "-o", tmp_path / "out", "-v").code == 0
    assert_names(wide("inspect", tmp_path / "out", "-v"), wide("inspect", tmp_path / "out", "-v").out)


@pytest.mark.parametrize("prefix", ["[/x]", "[link=http://evil]", "\x1b[2J", ":smile:"])
def test_a_hostile_prefix_that_all_names_share(call: Call, tmp_path: Path, prefix: str) -> None:
    """In a narrow terminal it stands once, in the head of the table."""
    base = write_base(tmp_path / "base", {f"{prefix}.layers.{n}.{'x' * 60}": numbers(2) for n in range(3)}, shards=1)
    ran = call("inspect", base)
    assert ran.code == 0
    assert_harmless(ran.out)
    assert shown(prefix) in ran.out


def test_hostile_names_are_exact_in_json(wide: Call, tmp_path: Path) -> None:
    base, adapter = hostile_base(tmp_path / "base"), hostile_adapter(tmp_path / "adapter")
    document = wide("inspect", base, "--json").document
    assert {entry["key"] for entry in document["tensors"]} == {f"{name}.weight" for name in NAMES}
    modules = wide("inspect", adapter, "--json", "--base", base).document["modules"]
    assert {(entry["module"], entry["key"]) for entry in modules} == {(name, f"{name}.weight") for name in NAMES}


def test_hostile_names_in_errors(wide: Call, world: World, tmp_path: Path) -> None:
    adapter = hostile_adapter(tmp_path / "adapter", prefix="x.")
    for at in range(len(NAMES)):
        # Eight are shown; go through all of them.
        tensors = {f"{NAMES[at]}.{side}": numbers(2, 2) for side in "AB"}
        one = write_adapter(tmp_path / f"a{at}", {f"{PREFIX}{key}": value for key, value in tensors.items()})
        (one / "adapter_config.json").unlink()
        ran = wide("merge", world.base, one, "-o", tmp_path / "out", "--scale", "1")
        assert ran.code == 20
        assert_harmless(ran.err)
        assert shown(NAMES[at]) in ran.err
    ran = wide("merge", world.base, adapter, "-o", tmp_path / "out", "--json")
    assert len(ran.document["details"]) == len(NAMES)
    assert all(any(f"x.{name}.weight" in text for text in ran.document["details"]) for name in NAMES)


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_everywhere_else(wide: Call, world: World, tmp_path: Path, name: str) -> None:
    """In config fields, types, shard names, options, paths."""
    index = write_base(tmp_path / "indexed")
    write_json(index / "model.safetensors.index.json", {"weight_map": {"a": f"{name}.safetensors/"}})
    typed = write_adapter(tmp_path / "typed", peft_type=name)
    lines: list[list[object]] = [
        ["merge", world.base, write_adapter(tmp_path / "field", None, **{name: name}), "-o", "out"],
        ["merge", world.base, write_adapter(tmp_path / "value", use_qalora=name), "-o", "out"],
        ["merge", world.base, write_adapter(tmp_path / "pattern", rank_pattern={f"({name}": 2}), "-o", "out"],
        ["merge", world.base, typed, "-o", "out"],
        ["inspect", index],
        ["merge", world.base, world.adapter, "-o", "out", f"--x{name}"],
        ["merge", world.base, world.adapter, "-o", "out", "--map", name.replace("=", "")],
        ["merge", world.base, world.adapter, "-o", f"no/{name.replace(chr(0), '')}/out"],
        ["inspect", f"no/such/{name}"],
        ["inspect", f"some-owner/{name}"],
        [name],
    ]
    for arguments in lines:
        ran = wide(*arguments)
        assert ran.code in (2, 11, 12), (arguments, ran.err)
        assert ran.out == ""
        assert_harmless(ran.err)
        assert json.loads(wide(*arguments, "--json").out)["exit"] == ran.code


def test_odd_paths(wide: Call, world: World, tmp_path: Path) -> None:
    """Names that are no text at all, and names that end lines, are opened and shown escaped."""
    for name in (b"\xff\xfe".decode(errors="surrogateescape"), "new\nline", "\x1b[2J", "[x]"):
        base = write_base(tmp_path / name)
        ran = wide("merge", base, world.adapter, "-o", tmp_path / f"{name}-out")
        assert ran.code == 0, ran.err
        assert_harmless(ran.out)
        assert_harmless(ran.err)
        assert shown(name) in ran.out
        printed = name.encode("utf-8", "backslashreplace").decode()  # so that every reader of JSON takes it
        assert wide("inspect", tmp_path / f"{name}-out", "--json").document["label"] == f"{printed}-out"


# Numbers for people


SIZES = {"4096": 4096, "1kB": 1000, "1KiB": 1024, "256MiB": 2**28, "1.5 GB": 1_500_000_000, " 2gib ": 2**31, "7b": 7}


@pytest.mark.parametrize(("text", "expected"), SIZES.items())
def test_sizes_are_parsed(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "B", "0", "-1MB", "1XB", "MB1", "1MiBB", "1 2MB", "nan", "inf", "1e400", "1,5GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_size(text)


def test_numbers_for_people() -> None:
    sizes = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 1_500_000: "1.5 MB", 2.5e9: "2.5 GB", 3e12: "3.00 TB"}
    assert {value: size(value) for value in sizes} == sizes
    numbers_ = {2.0: "2", 0.353553390593: "0.353553", 1e-7: "1e-07"}
    assert {value: number(value) for value in numbers_} == numbers_
    assert [count(n, "file") for n in (0, 1, 1400)] == ["0 files", "1 file", "1,400 files"]
    times = {0.25: "0.2 s", 59.9: "59.9 s", 60: "1 min 0 s", 125: "2 min 5 s", 119.7: "2 min 0 s", 3600: "60 min 0 s"}
    assert {value: duration(value) for value in times} == times
