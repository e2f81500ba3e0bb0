"""When the machine, the Hub or the program itself fails: the exit codes 31, 32, 40 and 70, and nothing left behind."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from cli_world import Call, Ran, World, call_fixture, process, world_fixture  # noqa: F401 (fixtures)
from tiny import listing

from lora_cli.surgery import inspect as surgery

both_forms = pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "json"])


def assert_failed(ran: Ran, code: int, name: str, *words: str) -> None:
    """An error in the form that was asked for, with an action, and without a traceback."""
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.out + ran.err
    if ran.out:
        assert ran.err == ""
        assert (ran.document["code"], ran.document["exit"]) == (name, code)
        assert ran.document["hint"]
        text = str(ran.document)
    else:
        assert "error: " in ran.err
        assert "  try: " in ran.err
        text = ran.err
    assert [word for word in words if word not in text] == []


def failing(number: int) -> Callable[..., NoReturn]:
    def fail(*arguments: object, **options: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


def nearly_full(path: object) -> Any:
    """Of a million bytes a hundred are free."""
    return type("Usage", (), {"f_frsize": 1, "f_blocks": 10**6, "f_bavail": 100})


COMMANDS = {"merge": "{base} {adapter} -o {out}", "unmerge": "{merged} {adapter} --approximate -o {out}"}


@both_forms
@pytest.mark.parametrize("command", COMMANDS)
def test_31_no_space_before_the_work(
    call: Call, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, flags: tuple[str, ...]
) -> None:
    monkeypatch.setattr(os, "statvfs", nearly_full)
    ran = call(command, *world.fill(tuple(COMMANDS[command].split()), tmp_path), *flags)
    assert_failed(ran, 31, "disk-full", "100 bytes free", "-o")
    assert list(tmp_path.iterdir()) == []


def test_31_a_dry_run_says_that_it_does_not_fit(
    call: Call, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", nearly_full)
    line = ["merge", world.base, world.adapter, "-o", tmp_path / "out", "--dry-run"]
    assert "it does not fit" in call(*line).out
    document = call(*line, "--json").document
    assert (document["fits"], document["free_disk_bytes"]) == (False, 100)


WRITES = {"preallocating": "posix_fallocate", "writing": "pwrite", "syncing": "fsync", "making the folder": "mkdir"}


@both_forms
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=["full", "quota", "broken"])
@pytest.mark.parametrize("call_name", WRITES.values(), ids=WRITES.keys())
def test_31_and_32_while_writing(
    call: Call, world: World, tmp_path: Path, call_name: str, number: int, flags: tuple[str, ...]
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, call_name, failing(number))
        ran = call("merge", world.base, world.adapter, "-o", tmp_path / "out", *flags)
    assert_failed(ran, *((32, "write") if number == errno.EIO else (31, "disk-full")))
    assert list(tmp_path.iterdir()) == []


def test_32_a_limit_on_the_length_of_files(world: World, tmp_path: Path) -> None:
    """A real one: the shell allows a kilobyte."""
    import resource

    ran = process(
        "merge", world.base, world.adapter, "-o", tmp_path / "out", "-q",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024)),
    )  # fmt: skip
    assert_failed(ran, 32, "write", "model-0000", os.strerror(errno.EFBIG))
    assert list(tmp_path.iterdir()) == []


@both_forms
def test_40_offline(tmp_path: Path, flags: tuple[str, ...]) -> None:
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    ran = process("inspect", "some-owner/some-name", *flags, env=env)
    assert_failed(ran, 40, "hub", "some-owner/some-name", "HF_HUB_OFFLINE")


@both_forms
@pytest.mark.parametrize("error", [ValueError("bad \x1b[2J"), RecursionError("deep"), AssertionError()])
def test_70_a_fault_of_our_own(
    call: Call, world: World, monkeypatch: pytest.MonkeyPatch, error: Exception, flags: tuple[str, ...]
) -> None:
    def broken(*arguments: object, **options: object) -> NoReturn:
        raise error

    monkeypatch.setattr(surgery, "inspect", broken)
    ran = call("inspect", world.base, *flags)
    assert_failed(ran, 70, "internal", type(error).__name__, "--debug")
    assert "\x1b" not in ran.out + ran.err
    assert "Traceback" in call("inspect", world.base, *flags, "--debug").err


def test_an_input_that_changes_is_no_mixture(
    call: Call, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody writes to the base after its headers were read: refused, nothing written."""
    from lora_cli.surgery import merge

    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    was: Any = merge.check_output

    def changing(*arguments: Any, **options: Any) -> Any:
        shard = next(base.glob("*1-of*"))
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        os.utime(shard, ns=(1, 1))
        return was(*arguments, **options)

    monkeypatch.setattr(merge, "check_output", changing)
    before = sorted(listing(tmp_path))
    ran = call("merge", base, world.adapter, "-o", tmp_path / "out", "--json")
    assert_failed(ran, 10, "malformed-file", "changed while it was read")
    assert sorted(listing(tmp_path)) == before
