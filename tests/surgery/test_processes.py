"""Merging, unmerging, verifying and comparing in processes, in threads and inline: the same bytes and findings."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from round_trips import RECEIPT, contents, gaussian, lora, write_adapter, write_base

from lora_cli.arithmetic.product import prepare
from lora_cli.checkpoint.staged import Scratch, Span
from lora_cli.errors import DiskFullError, LoraCliError, NumericError
from lora_cli.surgery import engine, products, workers
from lora_cli.surgery.diff import DiffResult, diff
from lora_cli.surgery.merge import MergeResult, merge, plan_merge
from lora_cli.surgery.readers import raw_bytes
from lora_cli.surgery.unmerge import UnmergeResult, unmerge
from lora_cli.surgery.verify import VerifyResult, verify

Patch = pytest.MonkeyPatch

LINUX = sys.platform == "linux" and hasattr(os, "fork")
needs_fork = pytest.mark.skipif(not LINUX, reason="units run in processes on Linux alone")
THREADS = {"inline": 1, "threads": 3, "processes": 3}
SIDE = 2048
TARGETS = ("a", "b", "c")
KEYS = (*TARGETS, "embed", "untouched.0", "untouched.1")
SHARDS = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]
"""a and b; c and embed, which is copied; and one of which no byte changes. Each tensor has 8 MiB."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of 48 MiB and an adapter of which some is lost in rounding."""
    folder = tmp_path_factory.mktemp("inputs")
    pattern = gaussian(1, SIDE, SIDE // 8)
    tensors = {
        f"{key}.weight": torch.cat([pattern * (1 + n + k / 8) for k in range(8)], dim=1).to(torch.bfloat16)
        for n, key in enumerate(KEYS)
    }
    write_base(folder / "base", tensors, 3)
    factors = {
        key: t for n, name in enumerate(TARGETS) for key, t in lora(10 * n, name, SIDE, SIDE, std=0.02 * 4**n).items()
    }
    write_adapter(folder / "adapter", factors)
    return folder


def go(patch: Patch, way: str) -> list[str]:
    """Let units run this way; returns where each run that is not inline is noted.

    Under pytest-xdist there are other threads, and `can_fork` would say no. Here it is safe to fork all the same:
    those threads wait for messages, units take no lock that one of them could hold, and workers end by `os._exit`.
    """
    noted: list[str] = []

    def can_fork() -> bool:
        noted.append(way)
        return way == "processes"

    patch.setattr(workers, "can_fork", can_fork)
    return noted


@dataclass
class Done:
    """All that was done in one way: the results, and the processes of which each undo file has fragments."""

    there: MergeResult
    plain: MergeResult
    again: UnmergeResult
    checked: VerifyResult
    without: VerifyResult
    apart: DiffResult
    writers: set[int] = field(default_factory=set)


def do_all(inputs: Path, folder: Path, way: str) -> Done:
    """Do everything in `folder`; all names are relative to it, so that results do not tell where it is."""
    with Patch.context() as patch:
        noted, writers = go(patch, way), spied_scratch(patch, folder / "writers", 2 if way == "processes" else 1)
        patch.chdir(folder)
        how: Any = {"threads": THREADS[way]}
        base, adapters = "../base", ["../adapter"]
        (folder / "base").symlink_to(inputs / "base")
        done = Done(
            merge(base, adapters, "merged", **how),
            merge(base, adapters, "plain", undo=False, **how),
            unmerge("merged", adapters, "back", **how),
            verify("merged", base, adapters, roundtrip=True, **how),
            verify("merged", None, adapters, roundtrip=True, **how),
            diff(base, "merged", **how),
            writers,
        )
    assert len(noted) >= (0 if way == "inline" else 6)  # comparing two checkpoints of this size is one unit
    return done


def spied_scratch(patch: Patch, place: Path, at_least: int) -> set[int]:
    """Note which processes fragments come from; each waits at its first until so many have begun."""
    place.mkdir()
    append, copy_to = Scratch.append, Scratch.copy_to
    writers: set[int] = set()

    def slow_append(self: Scratch, data: bytes) -> Span:
        (place / str(os.getpid())).touch()
        deadline = time.monotonic() + 20
        while len(os.listdir(place)) < at_least and time.monotonic() < deadline:  # noqa: PTH208
            time.sleep(0.005)
        return append(self, data)

    def spied_copy(self: Scratch, file: Any, offset: int, spans: Any) -> None:
        writers.update(int(span.file.rpartition("-")[2]) for span in spans)
        copy_to(self, file, offset, spans)

    patch.setattr(Scratch, "append", slow_append)
    patch.setattr(Scratch, "copy_to", spied_copy)
    return writers


class Ways:
    """What each way did, done once and when it is first asked for."""

    def __init__(self, inputs: Path) -> None:
        self.inputs = inputs
        self._done: dict[str, Done] = {}

    def folder(self, way: str) -> Path:
        return self.inputs / way

    def __getitem__(self, way: str) -> Done:
        if way not in self._done:
            self.folder(way).mkdir()
            self._done[way] = do_all(self.inputs, self.folder(way), way)
        return self._done[way]


@pytest.fixture(scope="module")
def ways(inputs: Path) -> Iterator[Ways]:
    yield Ways(inputs)
    shutil.rmtree(inputs)


SHARED = ["threads", pytest.param("processes", marks=needs_fork)]
OUTPUTS = ["merged", "plain", "back"]


@pytest.mark.parametrize("way", SHARED)
@pytest.mark.parametrize("name", OUTPUTS)
def test_every_file_has_the_same_bytes(ways: Ways, way: str, name: str) -> None:
    assert ways["inline"]
    assert ways[way]
    found = contents(ways.folder(way) / name)
    assert found == contents(ways.folder("inline") / name)
    assert found.keys() >= {*SHARDS, "config.json", "model.safetensors.index.json"}
    assert ("lora_merge.undo" in found, "lora_merge.json" in found) == (name == "merged", name != "back")


@pytest.mark.parametrize("way", SHARED)
@pytest.mark.parametrize("name", [part.name for part in dataclasses.fields(Done) if part.name != "writers"])
def test_every_result_says_the_same(ways: Ways, way: str, name: str) -> None:
    here, there = (dataclasses.asdict(getattr(ways[each], name)) for each in (way, "inline"))
    for result in (here, there):
        assert result.pop("seconds") > 0
        assert result.pop("peak_rss_bytes") > 1 << 20
    assert here == there


@pytest.mark.parametrize("way", ["inline", *SHARED])
def test_what_survived_is_the_same_wherever_it_is_measured(ways: Ways, way: str) -> None:
    done = ways[way]
    assert [found.key for found in done.there.survival] == [f"{key}.weight" for key in TARGETS]
    assert done.there.survival == done.plain.survival == done.checked.survival == ways["inline"].there.survival
    least, *_, most = (found.strength for found in done.there.survival)
    assert least is not None
    assert most is not None
    assert 0 < least < most <= 1.01


@pytest.mark.parametrize("way", ["inline", *SHARED])
def test_it_is_right(ways: Ways, way: str) -> None:
    """Equal is not enough: the base comes back, what is not changed is not, and the findings are true."""
    done, folder = ways[way], ways.folder(way)
    base, merged, plain, back = (contents(folder / name) for name in ("base", *OUTPUTS))
    assert back.pop(RECEIPT)
    assert back == base
    assert {name: merged[name] for name in SHARDS} == {name: plain[name] for name in SHARDS}
    assert [name for name in SHARDS if merged[name] == base[name]] == SHARDS[2:]
    assert {(done.checked.verified, done.checked.different), (done.without.verified, done.without.different)} == {
        (True, ())
    }
    for result in (done.checked, done.without):
        assert result.roundtrip is not None
        assert result.roundtrip.exact
    assert {changed.key for changed in done.apart.changed} == {f"{key}.weight" for key in TARGETS}
    assert (done.again.exact, done.again.proved) == (True, True)


@pytest.mark.parametrize("way", ["inline", *SHARED])
def test_nothing_of_the_work_is_published(ways: Ways, way: str) -> None:
    assert ways[way]
    found = {path.name for path in ways.folder(way).iterdir()}
    assert found == {"base", "writers", *OUTPUTS}
    assert not [path for name in OUTPUTS for path in (ways.folder(way) / name).rglob(".*")]


@needs_fork
def test_fragments_of_several_processes_are_put_together(ways: Ways) -> None:
    done = ways["processes"]
    assert len(done.writers) >= 2
    assert os.getpid() not in done.writers
    assert ways["inline"].writers == ways["threads"].writers == {os.getpid()}


# When it goes wrong


@pytest.fixture
def copied(inputs: Path, tmp_path: Path) -> Path:
    """The inputs in a folder of their own; files are shared until one is written anew."""
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
        for path in (inputs / name).iterdir():
            os.link(path, tmp_path / name / path.name)
    return tmp_path


FAILING = ["inline", *SHARED]


@pytest.mark.parametrize("undo", [True, False], ids=["undo", "no undo"])
@pytest.mark.parametrize("way", FAILING)
def test_nan_in_the_base_is_named_and_leaves_nothing(copied: Path, way: str, undo: bool, monkeypatch: Patch) -> None:
    path = copied / "base" / SHARDS[0]
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8:start])["b.weight"]["data_offsets"]
    raw[start + begin : start + end] = raw[start + begin : start + end - 2] + b"\xc0\x7f"  # the last is NaN
    path.unlink()
    path.write_bytes(raw)
    before = contents(copied)
    noted = go(monkeypatch, way)
    with pytest.raises(NumericError) as caught:
        merge(copied / "base", [copied / "adapter"], copied / "out", undo=undo, threads=THREADS[way])
    assert (caught.value.tensor, caught.value.exit_code) == ("b.weight", 22)
    assert bool(noted) == (way != "inline")
    assert contents(copied) == before


@pytest.mark.parametrize("calls", [0, 3, 10])
@pytest.mark.parametrize("way", FAILING)
def test_a_full_disk_is_said_and_leaves_nothing(copied: Path, way: str, calls: int, monkeypatch: Patch) -> None:
    """In whatever process the disk turns out to be full: each counts for itself."""
    pwrite, parent, left = os.pwrite, os.getpid(), [calls]

    def failing(*arguments: Any) -> int:
        if way != "processes" or os.getpid() != parent:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)

    before = contents(copied)
    go(monkeypatch, way)
    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(DiskFullError) as caught:
        merge(copied / "base", [copied / "adapter"], copied / "out", threads=THREADS[way])
    assert caught.value.file is not None
    assert "-o" in str(caught.value.hint)
    assert contents(copied) == before


@needs_fork
def test_a_worker_that_is_killed_leaves_nothing(copied: Path, monkeypatch: Patch) -> None:
    pwrite, parent = os.pwrite, os.getpid()

    def deadly(*arguments: Any) -> int:
        done = pwrite(*arguments)
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    before = contents(copied)
    go(monkeypatch, "processes")
    monkeypatch.setattr(os, "pwrite", deadly)
    with pytest.raises(LoraCliError, match="worker process was killed"):
        merge(copied / "base", [copied / "adapter"], copied / "out", threads=3)
    assert contents(copied) == before


def test_factors_are_prepared_once_for_the_cuts_of_a_tensor_that_follow_each_other(
    inputs: Path, monkeypatch: Patch
) -> None:
    made = plan_merge(inputs / "base", [inputs / "adapter"])
    one, other = (edit for edit in made.edits if edit.key in ("a.weight", "b.weight"))
    prepared: list[int] = []

    def counted(terms: Any, *, slices: Any) -> Any:
        prepared.append(slices)
        return prepare(terms, slices=slices)

    monkeypatch.setattr(products, "prepare", counted)
    cuts = [(one, 0, 700), (one, 700, SIDE), (other, 0, SIDE), (one, 0, 700)]
    workshop = engine.Workshop(1 << 20)
    kept = [b"".join(bytes(raw_bytes(p.result)) for p in workshop.pieces(*cut)) for cut in cuts]
    assert len(prepared) == 3
    fresh = [b"".join(bytes(raw_bytes(p.result)) for p in engine.Workshop(1 << 20).pieces(*cut)) for cut in cuts]
    assert kept == fresh
