"""Verify through the program: what it says of wrong merges, and the JUnit file, read again by another library."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_worlds import WORLDS
from cli_world import Call, World, call_fixture, process, world_fixture  # noqa: F401 (fixtures)
from junitparser import Error, Failure, JUnitXml, TestCase, TestSuite
from test_machine import assert_failed, failing
from test_text import HOSTILE, NAMES, assert_harmless, hostile_adapter, hostile_base
from tiny import MODULES, base_tensors, listing, numbers, read_tensors, write_adapter, write_base

from lora_cli.checkpoint import staged
from lora_cli.cli.text import shown
from lora_cli.surgery import verify as surgery

BARE = "the bare base: the adapter was not applied"
KEYS = sorted(f"{module}.weight" for module in MODULES)
DECLARED = "<?xml version='1.0' encoding='utf-8'?>\n"
YESTERDAY = f'{DECLARED}<testsuites name="lora-cli verify" tests="1">of yesterday</testsuites>'
REST, TRIP = "tensors that no adapter changes", "round trip"

both_forms = pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "json"])


def suite_of(path: Path) -> TestSuite:
    """The one suite of a file, whose counts agree with its content."""
    parsed = JUnitXml.fromfile(str(path))
    assert isinstance(parsed, JUnitXml)
    (suite,) = list(parsed)
    cases = list(suite)
    failures, errors = (
        sum(isinstance(one, kind) for case in cases for one in case.result) for kind in (Failure, Error)
    )
    for counted in (parsed, suite):
        assert (counted.name, counted.tests, counted.failures) == ("lora-cli verify", len(cases), failures)
        assert (counted.errors, counted.skipped) == (errors, 0)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert {case.classname for case in cases} == {"lora-cli.verify"}
    assert isinstance(suite, TestSuite)
    return suite


def cases_of(path: Path) -> dict[str, TestCase]:
    return {str(case.name): case for case in suite_of(path)}


def properties_of(path: Path) -> list[tuple[str | None, str | None]]:
    return [(one.name, one.value) for one in suite_of(path).properties()]  # type: ignore[no-untyped-call]


def failures_of(path: Path) -> dict[str, str]:
    """Message of each failure, which stands in the text too, for readers that show only that."""
    found = {}
    for name, case in cases_of(path).items():
        for result in case.result:
            assert isinstance(result, Failure)
            assert result.text == result.message
            found[name] = f"{result.type}: {result.message}"
    return found


def line(world: World, merged: Path | None = None) -> list[Any]:
    return ["verify", merged or world.merged, "--base", world.base, "--adapter", world.adapter]


# Words


def test_what_a_checkpoint_looks_like(call: Call, world: World) -> None:
    ran = call(*line(world, world.base))
    assert ran.code == 1
    assert ran.out.splitlines()[1] == f"all 4 tensors that differ look like {BARE}"
    assert "looks like" not in ran.out, "what all have in common is said once"
    assert len(re.findall(r"values +\d+ +[\d,]+ +0 *$", ran.out, re.MULTILINE)) == 4, "strength, of each in the table"
    document = call(*line(world, world.base), "--json").document
    assert document["looks_like"] == f"all 4 tensors that differ look like {BARE}"
    said = {entry["key"]: (entry["looks_like"], entry["strength"]) for entry in document["different"]}
    assert said == dict.fromkeys(KEYS, (BARE, 0))
    assert (document["merged"], document["base"], document["edited"]) == ("base", "base", KEYS)
    assert [(entry["key"], entry["changed_fraction"], entry["strength"]) for entry in document["survival"]] == [
        (key, 0, 0) for key in KEYS
    ]


def test_what_single_tensors_look_like(
    call: Call, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, base = read_tensors(world.merged), base_tensors()
    tensors[KEYS[0]] = base[KEYS[0]]
    tensors[KEYS[1]] = base[KEYS[1]] + 2 * (tensors[KEYS[1]] - base[KEYS[1]])
    tensors[KEYS[2]][3, 3] += 9
    tensors["model.position_ids"][2] = 7
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)
    del tensors["model.layers.0.input_layernorm.weight"]
    tensors["more"] = numbers(3)
    wrong = write_base(tmp_path / "wrong", tensors, shards=1)
    expected = {
        KEYS[0]: ("values", BARE),
        KEYS[1]: ("values", "the adapter applied twice"),
        KEYS[2]: ("values", "this merge with 1 changed element"),
        "model.position_ids": ("values", "the base with 1 changed element"),
        "lm_head.weight": ("dtype", None),
        "model.layers.0.input_layernorm.weight": ("missing", None),
        "more": ("unexpected", None),
    }
    document = call(*line(world, wrong), "--json").document
    assert {entry["key"]: (entry["what"], entry["looks_like"]) for entry in document["different"]} == expected
    assert document["looks_like"] is None
    monkeypatch.setenv("COLUMNS", "160")
    ran = call(*line(world, wrong), "--junit", tmp_path / "report.xml")
    assert ran.code == 1
    rows = {row.split()[0]: row.rstrip() for row in ran.out.splitlines() if row.strip()}
    for key, (what, words) in expected.items():
        assert what in rows[key]
        assert words is None or rows[key].endswith(words)
    assert "dtype F16, not F32" in rows["lm_head.weight"]
    failures = failures_of(tmp_path / "report.xml")
    assert failures.keys() == expected.keys()
    for key, (what, words) in expected.items():
        assert failures[key].startswith(f"{what}: ")
        assert words is None or failures[key].endswith(f"; it looks like {words}")
    assert failures["lm_head.weight"] == "dtype: dtype F16 instead of F32"
    assert failures["more"] == "unexpected: no merge writes it"
    cases = cases_of(tmp_path / "report.xml")
    assert list(cases) == [*KEYS, *(key for key in sorted(expected) if key not in KEYS), REST]
    right = base.keys() - expected.keys() - {*KEYS}
    assert cases[REST].system_out == f"{len(right)} tensors, byte for byte"


def test_values_that_differ_in_two_ways(
    call: Call, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is told what it looks like; and an edited tensor that is not there is no tensor that was read."""
    tensors, base = read_tensors(world.merged), base_tensors()
    tensors[KEYS[0]], tensors[KEYS[1]] = base[KEYS[0]], 2 * tensors[KEYS[1]] - base[KEYS[1]]
    monkeypatch.setenv("COLUMNS", "160")
    ran = call(*line(world, write_base(tmp_path / "values", tensors)))
    assert BARE in ran.out
    assert "the adapter applied twice" in ran.out
    del tensors[KEYS[3]]
    report = tmp_path / "report.xml"
    assert call(*line(world, write_base(tmp_path / "missing", tensors)), "--junit", report).code == 1
    assert failures_of(report)[KEYS[3]] == "missing: missing from the checkpoint"
    assert cases_of(report)[REST].system_out == "5 tensors, byte for byte"


def test_what_is_right(call: Call, world: World, tmp_path: Path) -> None:
    ran = call(*line(world), "--junit", tmp_path / "report.xml")
    assert ran.code == 0
    assert "strength  1.00 (4 tensors)" in ran.out
    suite, cases = suite_of(tmp_path / "report.xml"), cases_of(tmp_path / "report.xml")
    assert list(cases) == [*KEYS, REST]
    assert suite.failures == suite.errors == 0
    assert all(not case.result for case in cases.values())
    assert cases[REST].system_out == "5 tensors, byte for byte"
    assert cases[KEYS[0]].system_out == "strength 1, 100.0% of the weights are not the base's"
    properties = properties_of(tmp_path / "report.xml")
    assert properties[1:] == [
        ("merged", "merged"),
        ("base", "base"),
        ("adapter", "adapter (weight 1)"),
        ("max-ulp", "0"),
    ]
    assert suite.time is not None
    assert suite.time > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "report.xml"]


def test_only_tensors_that_an_adapter_changes(call: Call, tmp_path: Path) -> None:
    """Nothing is left for the last test, and then there is none."""
    key = f"{MODULES[0]}.weight"
    base = write_base(tmp_path / "base", {key: base_tensors()[key]}, shards=1)
    tensors = {
        f"base_model.model.{MODULES[0]}.lora_{side}.weight": numbers(*shape)
        for side, shape in (("A", (2, 8)), ("B", (12, 2)))
    }
    adapter = write_adapter(tmp_path / "adapter", tensors)
    report = tmp_path / "report.xml"
    assert call("verify", base, "--base", base, "--adapter", adapter, "--junit", report).code == 1
    assert list(cases_of(report)) == [key]


def test_a_config_that_says_otherwise(call: Call, tmp_path: Path) -> None:
    world, merged, report = WORLDS["untied"](tmp_path), tmp_path / "merged", tmp_path / "report.xml"
    call("merge", world.base, world.adapter, "-o", merged)
    shutil.copy(world.base / "config.json", merged)
    ran = call("verify", merged, "--base", world.base, "--adapter", world.adapter, "--junit", report)
    assert ran.code == 1
    words = "tie_word_embeddings is true; this merge makes it false"
    assert failures_of(report) == {"config.json": f"config: {words}"}
    assert list(cases_of(report)) == ["model.embed_tokens.weight", "config.json", REST]
    count = len(read_tensors(merged))
    assert str(cases_of(report)[REST].system_out) == f"{count - 1} tensors, byte for byte"
    assert f"differs 0 tensors of {count}, compared byte for byte, and config.json" in ran.out
    assert words in " ".join(ran.out.split())


def test_a_round_trip(call: Call, world: World, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    assert call(*line(world), "--roundtrip", "--junit", report).code == 0
    assert list(cases_of(report)) == [*KEYS, REST, TRIP]
    assert str(cases_of(report)[TRIP].system_out).endswith(", bit for bit as the base")
    alone = call("verify", world.merged, "--adapter", world.adapter, "--roundtrip", "--junit", report)
    assert alone.code == 0
    assert str(cases_of(report)[TRIP].system_out).endswith(", bit for bit as the digests in the undo file")
    assert failures_of(report) == {}


def test_a_round_trip_that_does_not_come_back(call: Call, world: World, tmp_path: Path) -> None:
    shutil.copytree(world.base, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text("{}")
    report = tmp_path / "report.xml"
    ran = call(
        "verify",
        world.merged,
        "--base",
        tmp_path / "base",
        "--adapter",
        world.adapter,
        "--roundtrip",
        "--junit",
        report,
    )
    assert ran.code == 1
    assert "not the base's file" in ran.out
    assert failures_of(report) == {
        "config.json": "roundtrip: after unmerging: not the base's file",
        TRIP: "roundtrip: 1 tensor or file not as the base",
    }


def test_a_round_trip_that_is_not_possible(call: Call, world: World, tmp_path: Path) -> None:
    """What is wrong is told still, beside what all other tensors have in common."""
    report = tmp_path / "report.xml"
    ran = call(*line(world, world.base), "--roundtrip", "--junit", report)
    assert ran.code == 1
    failures = failures_of(report)
    assert failures.pop(TRIP) == "roundtrip: not possible"
    assert {words.split("; it looks like ")[1] for words in failures.values()} == {BARE}


# The file


@both_forms
def test_the_file_is_written_whatever_is_shown(
    call: Call, world: World, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    report = tmp_path / "report.xml"
    ran = call(*line(world, world.base), "--junit", report, *flags)
    assert ran.code == 1
    assert set(failures_of(report)) == set(KEYS)
    assert bool(ran.out) == (flags != ("-q",))
    # What was there before is replaced.
    assert call(*line(world), "--junit", report, "-q").out == ""
    assert failures_of(report) == {}


def test_hostile_names(call: Call, tmp_path: Path) -> None:
    base, adapter, report = hostile_base(tmp_path / "base"), hostile_adapter(tmp_path / "adapter"), tmp_path / "r.xml"
    assert call("verify", base, "--base", base, "--adapter", adapter, "--junit", report).code == 1
    assert set(cases_of(report)) == {shown(f"{name}.weight", 10_000) for name in NAMES}
    text = report.read_text("utf-8")
    assert_harmless(text)
    assert shown(HOSTILE["clear screen"]) in text


def test_lone_surrogates_in_labels(world: World, tmp_path: Path) -> None:
    """A path that is no text at all is told, escaped."""
    base = write_base(tmp_path / os.fsdecode(b"b\xff"))
    ran = process("verify", world.merged, "--base", base, "--adapter", world.adapter, "--junit", tmp_path / "r.xml")
    assert ran.code == 0, ran.err
    assert ("base", "b\\udcff") in properties_of(tmp_path / "r.xml")


# Errors


@both_forms
def test_an_error_becomes_the_content(call: Call, world: World, tmp_path: Path, flags: tuple[str, ...]) -> None:
    other = write_adapter(tmp_path / "other", {"base_model.model.x.lora_A.weight": numbers(2, 2)})
    report = tmp_path / "report.xml"
    report.write_text(YESTERDAY)
    ran = call("verify", world.merged, "--base", world.base, "--adapter", other, "--junit", report, *flags)
    assert ran.code in (10, 20)
    (case,) = cases_of(report).values()
    (result,) = case.result
    assert isinstance(result, Error)
    assert case.name == "verification"
    assert result.type in ("names", "malformed-file")
    assert str(result.message).split(" (")[0] in ran.out + ran.err
    assert ("adapter", str(other)) in properties_of(report)


@pytest.mark.parametrize("options", [("--max-ulp", "-1"), ("--unknown",), ("--dtype", "int4")])
def test_a_command_line_that_is_none_writes_nothing(
    call: Call, world: World, tmp_path: Path, options: tuple[str]
) -> None:
    assert call(*line(world), "--junit", tmp_path / "report.xml", *options).code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_our_own_is_told(call: Call, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ValueError("bad \x1b[2J")

    monkeypatch.setattr(surgery, "verify", broken)
    assert call(*line(world), "--junit", tmp_path / "report.xml").code == 70
    (result,) = cases_of(tmp_path / "report.xml")["verification"].result
    assert (result.type, result.message) == ("internal", "ValueError: bad \\x1b[2J")


@both_forms
@pytest.mark.parametrize("name", ["posix_fallocate", "pwrite", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_31_and_32_while_writing(
    call: Call, world: World, tmp_path: Path, name: str, number: int, wrong: bool, flags: tuple[str, ...]
) -> None:
    """Nothing of it is left, and what was there is there still."""
    report = tmp_path / "report.xml"
    report.write_text(YESTERDAY)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, name, failing(number))
        ran = call(*line(world, world.base if wrong else None), "--junit", report, *flags)
    assert_failed(ran, *((32, "write") if number == errno.EIO else (31, "disk-full")), "report.xml")
    assert " -o" not in ran.out + ran.err, "there is no such option here"
    assert report.read_text() == YESTERDAY
    assert list(tmp_path.iterdir()) == [report]


def test_32_the_rename(call: Call, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "rename", failing(errno.EROFS))
    assert_failed(call(*line(world), "--junit", tmp_path / "report.xml"), 32, "write", "report.xml")
    assert list(tmp_path.iterdir()) == []


def test_the_first_error_is_told_when_the_file_cannot_be_written_either(
    call: Call, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
    ran = call("verify", world.merged, "--base", world.base, "--junit", tmp_path / "report.xml")
    assert_failed(ran, 2, "usage", "No adapter given")
    assert list(tmp_path.iterdir()) == []


def test_places_where_no_report_goes(call: Call, world: World, tmp_path: Path) -> None:
    before = listing(world.base)
    places = {
        tmp_path / "no" / "report.xml": (2, "usage", "does not exist"),
        tmp_path: (2, "usage", "no file"),
        "/dev/null": (2, "usage", "no file"),
        world.base / "report.xml": (30, "output-exists", "into an input"),
        world.base / "config.json": (30, "output-exists", "into an input"),
        world.adapter / "report.xml": (30, "output-exists", "into an input"),
        world.merged / "report.xml": (30, "output-exists", "into an input"),
        tmp_path / "other.lora_merge.undo": (30, "output-exists", "verify did not write"),
    }
    (tmp_path / "other.lora_merge.undo").write_bytes(b"of somebody's")
    for place, (code, name, words) in places.items():
        ran = call(*line(world), "--junit", place)
        assert_failed(ran, code, name, words)
        assert " -o" not in ran.err
    assert listing(world.base) == before


def test_a_folder_that_nobody_may_write_to_is_told_before_the_work(
    call: Call, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    monkeypatch.setattr(surgery, "verify", failing(errno.EIO))
    assert_failed(call(*line(world), "--junit", tmp_path / "report.xml"), 32, "write", "report.xml")


def test_a_small_file_is_written_whole(tmp_path: Path) -> None:
    place = tmp_path / "report.xml"
    for data in (b"one", b"", b"x" * 100_000):
        staged.write_beside(place, data)
        assert place.read_bytes() == data
    assert list(tmp_path.iterdir()) == [place]
