"""What the page cache is told: all of an output, unit by unit, and what would crowd memory once it is done."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from round_trips import contents, gaussian, lora, write_adapter, write_base

from lora_cli.checkpoint import advice
from lora_cli.surgery import filling, units
from lora_cli.surgery.budget import UNIT_BYTES
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions

Patch = pytest.MonkeyPatch
MIB = 1 << 20
BLOCK = 8 * MIB


class Told(NamedTuple):
    """What the system was told of: a file by what it is, not by its name, and a range of it."""

    file: tuple[int, int]
    offset: int
    length: int


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_dev, path.stat().st_ino


def listened(patch: Patch, module: Any, name: str) -> list[Told]:
    """Note every call of advice, and give it all the same."""
    told: list[Told] = []
    real = getattr(module, name)

    def listening(descriptor: int, offset: int = 0, length: int = 0) -> None:
        status = os.fstat(descriptor)
        told.append(Told((status.st_dev, status.st_ino), offset, length))
        real(descriptor, offset, length)

    patch.setattr(module, name, listening)
    return told


# Asking the system


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """What was found out about the system is forgotten, before and after."""
    advice._sync_file_range.cache_clear()
    yield
    advice._sync_file_range.cache_clear()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no other system has it")
@pytest.mark.usefixtures("asked_anew")
def test_linux_takes_the_advice(tmp_path: Path) -> None:
    call = advice._sync_file_range()
    assert call is not None
    assert call.argtypes == (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)  # type: ignore[attr-defined]
    with (tmp_path / "file").open("wb") as file:
        file.write(bytes(MIB))
        file.flush()
        advice.start_writing(file.fileno(), 0, MIB)
        advice.start_writing(file.fileno(), 1 << 40, BLOCK)  # far beyond what 32 bits hold, and beyond its end


def test_the_advice_is_to_begin_and_not_to_wait(monkeypatch: Patch) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(advice, "_sync_file_range", lambda: lambda *arguments: calls.append(arguments))
    advice.start_writing(5, 3 * BLOCK, 2 * BLOCK)
    assert calls == [(5, 3 * BLOCK, 2 * BLOCK, 2)]


@pytest.mark.usefixtures("asked_anew")
def test_a_bad_descriptor_is_no_error_here(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    os.close(descriptor)
    for bad in (-1, descriptor):
        advice.start_writing(bad, 0, BLOCK)


@pytest.mark.parametrize("platform", ["darwin", "win32", "freebsd14"])
@pytest.mark.usefixtures("asked_anew")
def test_other_systems_are_not_asked(tmp_path: Path, monkeypatch: Patch, platform: str) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.delattr(ctypes, "CDLL")
    assert advice._sync_file_range() is None
    advice.start_writing(-1, 0, BLOCK)


@pytest.mark.usefixtures("asked_anew")
def test_a_library_without_the_call_is_not_asked(monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert advice._sync_file_range() is None
    advice.start_writing(-1, 0, BLOCK)


@pytest.mark.parametrize(("nbytes", "crowded"), [(0, False), (2_048_000, False), (2_048_001, True), (1 << 60, True)])
def test_more_than_half_of_memory_crowds(monkeypatch: Patch, nbytes: int, crowded: bool) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert advice.crowds(nbytes) is crowded


@pytest.mark.parametrize("error", [OSError, ValueError, AttributeError])
def test_where_memory_is_not_known_nothing_crowds(monkeypatch: Patch, error: type[Exception]) -> None:
    def unknown(name: str) -> int:
        raise error(name)

    monkeypatch.setattr(os, "sysconf", unknown)
    assert advice.crowds(1 << 60) is False
    if error is AttributeError:
        monkeypatch.delattr(os, "sysconf")
        assert advice.crowds(1 << 60) is False


def test_forgetting_is_left_out_where_it_cannot_be_had(monkeypatch: Patch) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    advice.forget(-1)


# Beside the work


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A base of four shards, one of which stays as it is, and two adapters for it."""
    tensors: dict[str, Any] = {f"{key}.weight": gaussian(n, 30 + n, 20) for n, key in enumerate("xyz")}
    tensors |= {"x.bias": gaussian(8, 30), "packed": ("F4", [4, 3], b"654321"), "n": ("I16", [50, 3], bytes(300))}
    write_base(tmp_path / "base", tensors | {"last.weight": gaussian(9, 40, 7), "last": gaussian(10, 1)}, 4)
    write_adapter(tmp_path / "one", lora(20, "x", 30, 20) | lora(30, "z", 32, 20))
    write_adapter(tmp_path / "two", lora(40, "x", 30, 20))
    return tmp_path


def do(folder: Path, out: str, dtype: str = "keep", **how: Any) -> list[Path]:
    """Merge; returns the safetensors files of the output."""
    options = PlanOptions(dtype=dtype)
    merge(folder / "base", [folder / "one", folder / "two"], folder / out, options, threads=1, **how)
    return sorted((folder / out).glob("*.safetensors"))


def assert_covered(path: Path, told: list[Told], *, header: bool) -> None:
    """Each byte of a file was told of once; what stands before its data may be left out, if not asked for."""
    ranges = sorted((each.offset, each.length) for each in told if each.file == identity(path))
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    at = 0 if header or not ranges[0][0] else start
    for offset, length in ranges:
        assert offset == at
        assert length > 0  # 0 would be all that follows
        at += length
    assert at == path.stat().st_size


both = pytest.mark.parametrize("undo", [True, False], ids=["undo", "no undo"])
types = pytest.mark.parametrize("dtype", ["keep", "fp16"])
cuts = pytest.mark.parametrize("most", [UNIT_BYTES, 100], ids=["whole", "in pieces"])


@both
@types
@cuts
def test_the_disk_is_handed_all_of_the_output_once(
    job: Path, monkeypatch: Patch, dtype: str, undo: bool, most: int
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", most)
    told = listened(monkeypatch, advice, "start_writing")
    files = do(job, "out", dtype, undo=undo)
    assert {each.file for each in told} == {identity(path) for path in files}
    for path in files:
        assert_covered(path, told, header=True)
    assert len(told) == len(set(told))


def test_what_is_handed_over_is_there_by_then(job: Path, monkeypatch: Patch) -> None:
    """A range that is written later would be written twice, or wait for itself."""
    found: list[tuple[Told, bytes]] = []

    def reading(descriptor: int, offset: int, length: int) -> None:
        status = os.fstat(descriptor)
        told = Told((status.st_dev, status.st_ino), offset, length)
        found.append((told, os.pread(descriptor, length, offset)))

    monkeypatch.setattr(advice, "start_writing", reading)
    files = {identity(path): path.read_bytes() for path in do(job, "out")}
    assert found
    for told, data in found:
        assert data == files[told.file][told.offset : told.offset + told.length]


@both
@types
@cuts
def test_what_crowds_is_forgotten_and_the_bytes_are_the_same(
    job: Path, monkeypatch: Patch, dtype: str, undo: bool, most: int
) -> None:
    do(job, "calm", dtype, undo=undo)
    monkeypatch.setattr(units, "UNIT_BYTES", most)
    monkeypatch.setattr(filling, "crowds", lambda _: True)
    inputs, outputs = (listened(monkeypatch, module, "forget") for module in (filling, advice))
    files = do(job, "crowded", dtype, undo=undo)
    assert contents(job / "crowded") == contents(job / "calm")
    shards = sorted((job / "base").glob("*.safetensors"))
    assert {each.file for each in inputs} == {identity(path) for path in shards}
    for path in shards:
        assert_covered(path, inputs, header=False)
    assert sorted(outputs) == sorted(Told(identity(path), 0, 0) for path in files)  # 0 for all that is there


def test_what_does_not_crowd_is_kept(job: Path, monkeypatch: Patch) -> None:
    inputs, outputs = (listened(monkeypatch, module, "forget") for module in (filling, advice))
    asked: list[int] = []

    def crowds(nbytes: int) -> bool:
        asked.append(nbytes)
        return False

    monkeypatch.setattr(filling, "crowds", crowds)
    files = do(job, "out")
    assert inputs == outputs == []
    assert asked == [2 * sum(path.stat().st_size for path in files)]
