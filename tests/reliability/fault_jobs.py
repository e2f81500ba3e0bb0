"""Commands that write, small enough to be run once for each of their calls to the system."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import pytest
from faults import PUBLISHING, Act, Double, Operation, nothing
from tiny import write_adapter, write_base

from lora_cli.cli.app import run

Snapshot = dict[str, tuple[int, bytes | None]]
LEFTOVER = ".lora-cli-"
NAMES = (
    *("merge", "merge over a merge", "merge one file", "merge one file over a merge"),
    *("unmerge", "unmerge one file over a merge", "inject", "inject wrapped", "inject from weights"),
)


def snapshot(folder: Path) -> Snapshot:
    """Everything below a folder: mode, and the bytes of files."""
    return {
        path.relative_to(folder).as_posix(): (path.lstat().st_mode, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


def without_leftovers(found: Snapshot) -> Snapshot:
    """What a person sees: without what is named as work of ours that was broken off."""
    return {name: what for name, what in found.items() if not is_leftover(name)}


def is_leftover(name: str) -> bool:
    """Whether a path is, or is in, something that is hidden beside an output of the jobs and has our name."""
    first = name.partition("/")[0]
    return LEFTOVER in first and first.startswith((".out", ".left"))


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    document: dict[str, Any]
    err: str


def quietly(line: Sequence[object], *, threads: int = 1) -> Ended:
    """Run the program here, with a document for its result or its error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([*map(str, line), "--json", "--threads", str(threads)])
    return Ended(code, json.loads(out.getvalue()) if out.getvalue() else {}, err.getvalue())


@dataclass(frozen=True)
class Job:
    """A command line with what stands at its outputs before, and what is to stand there after.

    Attributes:
        name: What it is called in tests.
        line: The arguments; its outputs are in `place`.
        place: The folder of the outputs.
        inputs: Folders that may not change.
        old: A folder with what `place` holds before, or None for nothing.
        before: The same as a snapshot.
        complete: What `place` holds after.
        given: What the inputs hold.
    """

    name: str
    line: tuple[str, ...]
    place: Path
    inputs: tuple[Path, ...]
    old: Path | None
    before: Snapshot
    complete: Snapshot
    given: tuple[Snapshot, ...]

    def prepare(self) -> None:
        """Put everything as it was."""
        shutil.rmtree(self.place, ignore_errors=True)
        if self.old is None:
            self.place.mkdir()
        else:
            shutil.copytree(self.old, self.place)

    def run(self) -> Ended:
        """Run it, as things stand."""
        return quietly(self.line)

    def log(self, before: Act = nothing) -> list[Operation]:
        """All calls of a run that succeeds."""
        double = Double(before=before)
        self.prepare()
        with double.installed():
            ended = self.run()
        assert (ended.code, self.found()) == (0, self.complete), ended
        return double.log

    def run_again(self) -> Ended:
        """Run it once more, so that it replaces what is there of its own."""
        return quietly([*self.line, *({"--force"} - {*self.line})])

    @property
    def single(self) -> bool:
        """Whether the output is one file, with others beside it."""
        return "out.safetensors" in self.complete

    @property
    def last(self) -> str:
        """What is put in its place last: the receipt of one file, or the adapter after what is left of its base."""
        if not self.single:
            return "out"
        return "out.lora_unmerge.json" if self.line[0] == "unmerge" else "out.lora_merge.json"

    def inputs_untouched(self) -> bool:
        """Whether no input has changed."""
        return tuple(map(snapshot, self.inputs)) == self.given

    def nothing_lost(self) -> bool:
        """Whether every file that was there before is there still, if only in what was left."""
        contents = [content for _, content in self.found().values()]
        return all(content in contents for _, content in self.before.values())

    def found(self) -> Snapshot:
        """What `place` holds now."""
        return snapshot(self.place)


def sample(log: Sequence[Operation], seed: int, *, share: int = 1, all_calls: bool = False) -> list[int]:
    """Which calls are tried, counted from one: those that give names and what follows, and one of each other kind.

    Args:
        log: All calls.
        seed: Another one chooses others.
        share: One of so many kinds is enough.
        all_calls: All are tried.
    """
    if all_calls:
        return list(range(1, len(log) + 1))
    naming = [at for at, operation in enumerate(log, 1) if operation.name in PUBLISHING]
    kinds: dict[tuple[str, str], list[int]] = {}
    for at, operation in enumerate(log, 1):
        kinds.setdefault((operation.name, _kind(operation.path)), []).append(at)
    others = [calls[seed % len(calls)] for calls in kinds.values()]
    return sorted({*naming, *(at + 1 for at in naming if at < len(log)), *others[seed % share :: share]})


def _kind(path: str) -> str:
    """What a path is, whatever its name is: which folder it is in, and what kind of file."""
    place = re.sub(r"(\.lora-cli-)[0-9a-f]{12}|(scratch-).*", r"\1\2", path)
    inner = place.partition(LEFTOVER)[2]
    return inner.rpartition("/")[0] + PurePath(place).suffix if inner else PurePath(place).suffix


class Jobs:
    """The jobs, made in a folder as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Job] = {}
        self.base, self.adapter = write_base(folder / "base", shards=3), write_adapter(folder / "adapter")
        for name in ("tokenizer.json", "generation_config.json"):
            (self.base / name).write_text('{"a": 1}\n')
        (self.base / "1_Pooling").mkdir()
        (self.base / "1_Pooling" / "config.json").write_text("{}\n")
        (self.base / "LICENSE").write_text("Do as you like.\n")
        self.file = write_base(folder / "single", shards=1) / "model.safetensors"
        self.merged, self.merged_file = folder / "merged", folder / "merged_file" / "m.safetensors"
        self.merged_file.parent.mkdir()
        self._make(["merge", self.base, self.adapter, "-o", self.merged])
        self._make(["merge", self.file, self.adapter, "-o", self.merged_file])

    def __getitem__(self, name: str) -> Job:
        if name not in self._made:
            self._made[name] = self._job(name)
        return self._made[name]

    def _job(self, name: str) -> Job:
        place = self._folder / name.replace(" ", "-") / "place"
        place.parent.mkdir()
        out, file = str(place / "out"), str(place / "out.safetensors")
        base, adapter = str(self.base), str(self.adapter)
        merge, single = ("merge", base, adapter, "-o", out), ("merge", str(self.file), adapter, "-o", file)
        inject = ("inject", base, "--rank", "2", "-o", out)
        unmerge_file = ("unmerge", str(self.merged_file), adapter, "-o", file)
        line, old = {
            "merge": (merge, None),
            "merge over a merge": ((*merge, "--force"), (*merge, "--weight", "2")),
            "merge one file": (single, None),
            "merge one file over a merge": ((*single, "--force", "--dtype", "bf16"), (*single, "--weight", "2")),
            "unmerge": (("unmerge", str(self.merged), adapter, "-o", out), None),
            "unmerge one file over a merge": ((*unmerge_file, "--force"), (*single, "--weight", "2")),
            "inject": (inject, None),
            "inject wrapped": ((*inject, "--layout", "wrapped"), None),
            "inject from weights": ((*inject, "--init", "pissa", "--base-out", str(place / "left")), None),
        }[name]
        before = None
        place.mkdir()
        if old is not None:
            self._make(old)
            before = place.parent / "old"
            shutil.copytree(place, before)
        earlier = snapshot(place)
        self._make(line)
        inputs = (self.base, self.adapter, self.file.parent, self.merged, self.merged_file.parent)
        return Job(name, line, place, inputs, before, earlier, snapshot(place), tuple(map(snapshot, inputs)))

    @staticmethod
    def _make(line: Sequence[object]) -> None:
        ended = quietly(line)
        assert ended.code == 0, ended


@pytest.fixture(scope="session", name="jobs")
def jobs_fixture(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """The jobs, each made when it is asked for the first time."""
    return Jobs(tmp_path_factory.mktemp("jobs"))
