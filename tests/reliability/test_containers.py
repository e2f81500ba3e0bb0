"""R001 to R053: what is no safetensors file, given to the program wherever it takes one; and what is odd, and is one.

The bytes of each case, and what the parser says of them, are in `header_cases`; that safetensors reads alike whatever
is accepted is tested in tests/checkpoint/test_header_against_upstream.py.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from catalogue import check_refused
from cli_world import Call, World, call_fixture, process, world_fixture  # noqa: F401 (fixtures)
from header_cases import REFUSED, Refused, container, u8
from safetensors.numpy import save_file
from tiny import MODULES, adapter_tensors, base_tensors, numbers, read_tensors, within

from lora_cli.checkpoint.header import HEADER_LIMIT

FILE = "m.safetensors"
INSPECT, BASE, ADAPTER = "inspect {x}", "merge {x} {adapter} -o {out}", "merge {base} {x} --scale 1 -o {out}"
PLACES = {
    "a base to verify": "verify {merged} --base {x} --adapter {adapter}",
    "a result to verify": "verify {x} --base {base} --adapter {adapter}",
    "the first of two": "diff {x} {base}",
    "the second of two": "diff {base} {x}",
    "a base to train on": "inject {x} -o {out} --rank 2",
    "merged": "unmerge {x} {adapter} --approximate -o {out}",
    "an undo file": "unmerge {merged} {adapter} --undo {x} -o {out}",
    "an adapter before training": "merge {base} {adapter} --initial {x} -o {out}",
    "an adapter to inspect against": "inspect {adapter} --base {x}",
    "a shard": "merge {folder} {adapter} -o {out}",
    "an adapter's folder": "merge {base} {peft} -o {out}",
}
SAMPLES: tuple[str, ...] = (
    "R001 empty file",
    "R004 length larger than the file",
    "R018 name twice, same offsets, other dtype",
)
SAMPLES += ("R034 bytes after the last tensor", "R037 data cut short", "R079 Git LFS pointer", "R080 HTML page")

every_case = pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())


def put(world: World, folder: Path, content: bytes) -> dict[str, str]:
    """A file of these bytes, alone, as the shard of a folder and as an adapter's factors."""
    (folder / FILE).write_bytes(content)
    shutil.copytree(world.base, folder / "folder")
    next((folder / "folder").glob("*.safetensors")).write_bytes(content)
    shutil.copytree(world.adapter, folder / "peft")
    (folder / "peft" / "adapter_model.safetensors").write_bytes(content)
    return {name: str(folder / where) for name, where in (("x", FILE), ("folder", "folder"), ("peft", "peft"))}


def line(text: str, world: World, place: Path, **given: str) -> list[str]:
    """A command line: {x} and its like are what is given, everything else is of the world."""
    parts = (given.get(part.strip("{}"), part) if part.startswith("{") else part for part in text.split())
    return world.fill(tuple(parts), place)


@pytest.mark.parametrize("where", [INSPECT, BASE, ADAPTER], ids=["inspect", "base", "adapter"])
@every_case
def test_what_is_no_container(call: Call, world: World, tmp_path: Path, case: Refused, where: str) -> None:
    (tmp_path / FILE).write_bytes(case.content)
    words = f"{FILE}|{case.fragment}"
    check_refused(
        call, line(where, world, tmp_path, x=str(tmp_path / FILE)), case.error.exit_code, words, folder=tmp_path
    )


@pytest.mark.parametrize("where", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("name", SAMPLES)
def test_wherever_a_container_is_read(call: Call, world: World, tmp_path: Path, name: str, where: str) -> None:
    case = REFUSED[name]
    arguments = line(where, world, tmp_path, **put(world, tmp_path, case.content))
    check_refused(call, arguments, case.error.exit_code, case.fragment, folder=tmp_path)


CODES = {
    10: "R001 R002 R003 R004 R005 R008 R009 R010 R013 R014 R015 R016 R017 R020 R021 R022 R023 R024 R025 R026 R027 R028 "
    "R029 R030 R031 R032 R033 R037 R038 R039 R040 R041 R042 R079 R080 R122 R123",
    11: "R018 R019 R034 R035 R036",
    12: "R025",
}
"""What the catalogue says, by exit code; a dtype that is none may be a newer one."""


def test_codes_are_those_of_the_catalogue() -> None:
    found: dict[int, set[str]] = {code: set() for code in CODES}
    for name, case in REFUSED.items():
        if name.startswith("R"):
            found[case.error.exit_code].add(name.split()[0])
    assert found == {code: set(numbers.split()) for code, numbers in CODES.items()}


# ---------------------------------------------------------------------------------------------- how much is read


def sparse(path: Path, start: bytes, size: int) -> Path:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
    return path


def peak_of(call: Call, *arguments: object) -> int:
    """Bytes that a second run allocates at most; the first one loads what is loaded once."""
    call(*arguments)
    tracemalloc.start()
    try:
        call(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [HEADER_LIMIT + 1, 46 << 20, 2**36 - 8, 2**63, 2**64 - 1])
def test_r006_a_header_over_the_limit_is_never_read(call: Call, tmp_path: Path, length: int) -> None:
    """R005, R048: so are the 46 MB that 800,000 tensors take, and numbers that no file is long enough for."""
    file = sparse(tmp_path / FILE, length.to_bytes(8, "little"), 2**36)
    words = f"{FILE}|The header is too long|at most {HEADER_LIMIT} bytes|{length} bytes"
    check_refused(call, ["inspect", file], 10, words, folder=tmp_path)
    assert peak_of(call, "inspect", file) < 4 << 20


def test_r007_a_header_at_the_limit_is_read_in_bounded_memory(call: Call, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(container(f'{{"t":{u8(0, 1)}}}'.ljust(HEADER_LIMIT), b"\1"))
    assert call("inspect", tmp_path / FILE).code == 0
    assert peak_of(call, "inspect", tmp_path / FILE) < 5 * HEADER_LIMIT


def test_r048_many_tensors_are_counted_and_a_few_are_shown(call: Call, tmp_path: Path) -> None:
    names = [f"model.layers.{number}.weight" for number in range(20_000)]
    empty = u8(0, 0)
    (tmp_path / FILE).write_bytes(container("{" + ",".join(f'"{name}":{empty}' for name in names) + "}"))
    with within(20):
        ran = call("inspect", tmp_path / FILE)
        document = call("inspect", tmp_path / FILE, "--json").document
    assert ran.code == 0
    assert "more (-v or --json lists all)" in ran.out
    assert len(ran.out.splitlines()) < 100
    assert [tensor["key"] for tensor in document["tensors"]] == sorted(names)


@pytest.mark.slow
def test_r048_as_many_tensors_as_a_header_can_hold_fit_into_a_gigabyte(tmp_path: Path) -> None:
    """Six hundred thousand with the shortest names: what each costs is all that a header made to harm can take."""
    entries: list[str] = []
    left, empty = HEADER_LIMIT - 2, u8(0, 0)
    while left > 80:
        entries.append(f'"{len(entries):x}":{empty}')
        left -= len(entries[-1]) + 1
    (tmp_path / FILE).write_bytes(container(("{" + ",".join(entries) + "}").ljust(HEADER_LIMIT)))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))

    ran = process("inspect", tmp_path / FILE, preexec_fn=limited)
    assert (ran.code, len(entries) > 600_000) == (0, True), ran.err
    assert f"{len(entries) - 40:,} more" in ran.out


def test_r049_a_name_of_ten_million_characters_is_cut_for_people(call: Call, tmp_path: Path) -> None:
    name = "n" * 10_000_000
    (tmp_path / FILE).write_bytes(container(f'{{"{name}":{u8(0, 1)}}}', b"\1"))
    (tmp_path / "bad.safetensors").write_bytes(container(f'{{"{name}":{u8(0, 1, "u8")}}}', b"\1"))
    with within(20):
        assert "…" in call("inspect", tmp_path / FILE).out
        assert len(call("inspect", tmp_path / FILE).out) < 2000
        assert call("inspect", tmp_path / FILE, "--json").document["tensors"][0]["key"] == name
        ran = check_refused(
            call, ["inspect", tmp_path / "bad.safetensors"], 10, "The dtype is not valid", folder=tmp_path
        )
    assert len(ran.err) < 1500


# ---------------------------------------------------------------------------------------------- odd, and all right

Stored = tuple[str, list[int], bytes]
TYPES = {"float32": "F32", "int64": "I64"}


def stored(tensors: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Stored]:
    return {name: (TYPES[str(t.dtype)], list(t.shape), t.tobytes()) for name, t in tensors.items()}


def packed(tensors: Mapping[str, Stored], tail: str = "", metadata: str = '{"format":"pt"}') -> bytes:
    """A file with tensors as they come, its header as no library of ours or others would write it."""
    entries, data = [f'"__metadata__": {metadata}'], b""
    for name, (dtype, shape, content) in tensors.items():
        span = [len(data), len(data) + len(content)]
        entries.append(f'{json.dumps(name)} :{{"data_offsets":{span}, "dtype":"{dtype}", "shape":{shape}}}')
        data += content
    return container("{" + ", ".join(entries) + "}" + tail, data)


PLAIN = stored(base_tensors())
FIRST: dict[str, Stored] = {"a": ("U8", [3], b"abc")}
ODD = {
    "R011 trailing spaces": packed(PLAIN, "     "),
    "R012 trailing newline, tab and return": packed(PLAIN, "\n\t\r\n"),
    "R027 metadata null": packed(PLAIN, metadata="null"),
    "R043 scalars and tensors of no elements": packed(
        PLAIN | {"scalar": ("F32", [], b"1234"), "none": ("F16", [0, 3], b""), "end": ("BF16", [2, 0], b"")}
    ),
    "R044 tensors of no elements at the offset of others": packed(
        {"z": ("U8", [0], b""), "y": ("F64", [0], b"")} | PLAIN
    ),
    "R045 no name, and names of control characters": packed(
        PLAIN | {"": ("U8", [1], b"x"), "\x1b[2J\0\r\n": ("I8", [1], b"y")}
    ),
    "R049 a long name": packed(PLAIN | {"n" * 1_000_000: ("U8", [1], b"x")}),
    "R050 numbers that lie unaligned": packed(FIRST | PLAIN),
    "R051 a BOOL that is neither 0 nor 1": packed(PLAIN | {"mask": ("BOOL", [3], b"\0\2\xff")}),
    "R073 names that differ by case or by the form of an accent": packed(
        PLAIN | {name: ("U8", [1], name.encode()[-1:]) for name in ("\u00e9", "e\u0301", "A", "a")}
    ),
    "packed types": packed(PLAIN | {"four": ("F4", [2, 3], b"123"), "six": ("F6_E2M3", [4], b"123")}),
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD.keys())
def test_odd_containers_pass_through_with_every_byte(call: Call, world: World, tmp_path: Path, content: bytes) -> None:
    base, merged, back = (tmp_path / f"{name}.safetensors" for name in ("base", "merged", "back"))
    base.write_bytes(content)
    assert call("inspect", base).code == 0
    assert call("diff", base, base).code == 0
    assert call("merge", base, world.adapter, "-o", merged).code == 0
    start = 8 + int.from_bytes(content[:8], "little")
    assert merged.read_bytes()[:start] == content[:start]
    edited = {f"{module}.weight" for module in MODULES}
    before, after = header(content), header(merged.read_bytes())
    changed = {name for name in before if before[name] != after[name]}
    assert changed == edited, "passed through changed, or an edited tensor did not"
    for module in MODULES:
        expected = read_tensors(world.merged)[f"{module}.weight"]
        assert after[f"{module}.weight"] == expected.tobytes()
    assert call("verify", merged, "--base", base, "--adapter", world.adapter, "--roundtrip").code == 0
    assert call("unmerge", merged, world.adapter, "-o", back).code == 0
    assert back.read_bytes() == content


def header(content: bytes) -> dict[str, bytes]:
    """The bytes of each tensor, by a reading of its own."""
    start = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:start])
    return {
        name: content[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def test_r045_a_name_without_characters_is_shown_as_one(call: Call, world: World, tmp_path: Path) -> None:
    base, other = tmp_path / "base.safetensors", tmp_path / "other.safetensors"
    base.write_bytes(packed(PLAIN | {"": ("F32", [4, 2], bytes(32))}))
    other.write_bytes(packed(PLAIN | {"": ("F32", [4, 2], bytes(31) + b"\1")}))
    assert '\n""  ' in call("inspect", base).out
    assert '\n""  ' in call("diff", base, other).out
    assert 'only in base.safetensors  ""\n' in call("diff", base, world.file).out.replace("   ", "  ")


@pytest.mark.parametrize("prefix", ["", ".", "base_model.model.", "base_model.model.."])
@pytest.mark.parametrize("config", [True, False], ids=["peft", "plain"])
def test_r045_no_adapter_changes_a_tensor_without_name(
    call: Call, world: World, tmp_path: Path, prefix: str, config: bool
) -> None:
    base, adapter = tmp_path / "base.safetensors", tmp_path / "adapter"
    base.write_bytes(packed(PLAIN | {"": ("F32", [4, 2], bytes(32)), ".weight": ("F32", [4, 2], bytes(32))}))
    adapter.mkdir()
    if config:
        shutil.copy(world.adapter / "adapter_config.json", adapter)
    factors = {f"{prefix}lora_A.weight": numbers(2, 2), f"{prefix}lora_B.weight": numbers(4, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    ran = call("merge", base, adapter, "--alpha", "1", "-o", tmp_path / "out.safetensors")
    assert ran.code in (12, 20), ran.err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("metadata", ["{}", '{"__metadata__":{"format":"pt"}}'])
def test_r047_a_container_of_nothing(call: Call, world: World, tmp_path: Path, metadata: str) -> None:
    """It is shown, and there is nothing in it to merge into, to train on or to take for factors."""
    (tmp_path / FILE).write_bytes(container(metadata))
    assert call("inspect", tmp_path / FILE, "--json").document["tensors"] == []
    file = str(tmp_path / FILE)
    check_refused(call, line(BASE, world, tmp_path, x=file), 20, "adapter|Nothing in this adapter", folder=tmp_path)
    check_refused(call, line(ADAPTER, world, tmp_path, x=file), 12, f"{FILE}|no tensors", folder=tmp_path)
    check_refused(call, ["inject", file, "-o", tmp_path / "o", "--rank", "2"], 20, "no module", folder=tmp_path)


@pytest.mark.parametrize(("dtype", "width"), [("BOOL", 1), ("I32", 4), ("U8", 1), ("C64", 8)])
def test_r051_numbers_of_other_kinds_are_copied_and_never_added_to(
    call: Call, world: World, tmp_path: Path, dtype: str, width: int
) -> None:
    name = f"{MODULES[0]}.weight"
    (tmp_path / FILE).write_bytes(packed(PLAIN | {name: (dtype, [12, 8], b"\2" * 96 * width)}))
    arguments = line(BASE, world, tmp_path, x=str(tmp_path / FILE))
    check_refused(call, arguments, 12, f"{name}|{dtype}", folder=tmp_path)


def test_r052_a_machine_of_the_other_byte_order(
    call: Call, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    for where in (INSPECT, BASE):
        arguments = line(where, world, tmp_path, x=str(world.file))
        check_refused(call, arguments, 12, "model.safetensors|highest byte first", folder=tmp_path)


def test_r053_a_flipped_bit_is_found_where_something_says_what_it_was(call: Call, world: World, tmp_path: Path) -> None:
    """In a tensor that no adapter touches: by the base, by the undo file; and the container itself does not tell."""
    base = tmp_path / "base.safetensors"
    base.write_bytes(packed(stored(base_tensors() | {"kept": numbers(4)})))
    factors = tmp_path / "adapter"
    shutil.copytree(world.adapter, factors)
    save_file(adapter_tensors(), factors / "adapter_model.safetensors")
    merged = tmp_path / "merged.safetensors"
    assert call("merge", base, factors, "-o", merged).code == 0
    content = bytearray(merged.read_bytes())
    content[-1] ^= 1
    merged.write_bytes(content)
    assert call("inspect", merged).code == 0
    verified = call("verify", merged, "--base", base, "--adapter", factors, "--json")
    assert (verified.code, [found["key"] for found in verified.document["different"]]) == (1, ["kept"])
    check_refused(call, ["unmerge", merged, factors, "-o", tmp_path / "out"], 23, "kept", folder=tmp_path)
