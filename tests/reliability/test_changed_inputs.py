"""R172: inputs that change while a command runs: what comes out is that of the old or of the new file, or nothing."""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from catalogue import entries
from cli_world import Call, Ran, World, call_fixture, world_fixture  # noqa: F401 (fixtures)
from tiny import write_json

import lora_cli
from lora_cli.checkpoint import files
from lora_cli.surgery import workers

Change = Callable[[Path], None]
REWRITTEN = (
    ('"float32"', '"float16"'),
    ('"lora_alpha": 4', '"lora_alpha": 8'),
    ("total", "TOTAL"),
    ('"base"', '"bass"'),
)
"""What makes another config, adapter, index and receipt."""


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b" " * 64)


def overwritten(path: Path) -> None:
    """In place, at the same length, and still what its name says."""
    data = other(path)
    with path.open("r+b") as file:
        file.write(data)


def replaced(path: Path) -> None:
    """By another file that is put in its place, as downloads and editors do; the old one lives on where it is open."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_bytes(other(path))
    beside.rename(path)


def gone(path: Path) -> None:
    path.unlink()


def other(path: Path) -> bytes:
    """Another file of the same kind and length: its numbers are others."""
    data = path.read_bytes()
    if path.suffix == ".json":
        text = data.decode()
        for old, new in REWRITTEN:
            if old in text:
                return text.replace(old, new).encode()
        return data[:-1] + b"]"
    return data[:-32] + bytes(byte ^ 1 for byte in data[-32:])


CHANGES: dict[str, Change] = {change.__name__: change for change in (truncated, grown, overwritten, replaced, gone)}


COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "merge": (
        "merge {base} {adapter} -o {out} --tokenizer adapter",
        (
            "base/model-00001-of-00002.safetensors",
            "base/model-00002-of-00002.safetensors",
            "base/model.safetensors.index.json",
            "base/config.json",
            "base/LICENSE",
            "adapter/adapter_model.safetensors",
            "adapter/adapter_config.json",
            "adapter/tokenizer.json",
        ),
    ),
    "unmerge": (
        "unmerge {merged} {adapter} -o {out}",
        (
            "merged/model-00001-of-00002.safetensors",
            "merged/model-00002-of-00002.safetensors",
            "merged/lora_merge.undo",
            "merged/config.json",
            "adapter/adapter_model.safetensors",
            "adapter/adapter_config.json",
        ),
    ),
    "merge once more": (
        "merge {merged} {adapter} -o {out} --again",
        ("merged/lora_merge.json", "merged/lora_merge.undo", "merged/README.md"),
    ),
    "verify": (
        "verify {merged} --base {base} --adapter {adapter} --roundtrip",
        (
            "merged/model-00001-of-00002.safetensors",
            "merged/lora_merge.undo",
            "base/model-00001-of-00002.safetensors",
            "base/model-00002-of-00002.safetensors",
            "base/config.json",
            "adapter/adapter_model.safetensors",
        ),
    ),
    "diff": (
        "diff {base} {merged} --rank",
        ("base/model-00001-of-00002.safetensors", "merged/model-00002-of-00002.safetensors"),
    ),
    "inject": (
        "inject {base} -o {out} --rank 1 --init pissa --base-out {out}-base",
        ("base/model-00001-of-00002.safetensors", "base/model-00002-of-00002.safetensors", "base/config.json"),
    ),
    "wrap": (
        "inject {base} -o {out} --rank 1 --layout wrapped",
        ("base/model-00001-of-00002.safetensors", "base/config.json", "base/LICENSE"),
    ),
    "inspect": (
        "inspect {adapter} --base {base} --spectrum",
        ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "base/model.safetensors.index.json"),
    ),
}
CASES = [(name, file) for name, (_, changed) in COMMANDS.items() for file in changed]


@dataclass
class Watch:
    """Counts what is done with one file, and changes it before a step of that.

    Attributes:
        file: The file.
        change: What is done to it.
        before: Before which step; never if that many do not come.
        steps: How many came.
    """

    file: Path
    change: Change
    before: int
    steps: int = 0
    open: set[int] = field(default_factory=set)

    def step(self) -> None:
        if self.steps == self.before:
            self.change(self.file)
        self.steps += 1


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Every opening, look, read and copy of a file passes through `files`."""

    def opened(path: Path) -> int:
        if path.name == watch.file.name and path.resolve() == watch.file.resolve():
            watch.step()
            watch.open.add(descriptor := open_to_read(path))
            return descriptor
        return open_to_read(path)

    def closed(descriptor: int) -> None:
        watch.open.discard(descriptor)
        close_read(descriptor)

    def stepping(name: str) -> Callable[..., Any]:
        def call(descriptor: int, *arguments: Any) -> Any:
            if descriptor in watch.open:
                watch.step()
            return was[name](descriptor, *arguments)

        return call

    open_to_read, close_read = files.open_to_read, files.close_read
    was = {name: getattr(files, name) for name in ("status", "read_at", "copy_range")}
    ours = {"open_to_read": opened, "close_read": closed} | {name: stepping(name) for name in was}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in ours.items():
            patch.setattr(files, name, function)
        yield


@dataclass(frozen=True)
class Outcome:
    """What a command came to: its exit code, what it found, and every byte that it wrote."""

    code: int
    found: str
    written: tuple[tuple[str, bytes], ...]


NOISE = (
    "out",
    "seconds",
    "peak_rss_bytes",
    "file",
    "hint",
    "message",
    "expected",
    "found",
    "details",
    "tensor",
    "code",
)


def outcome(ran: Ran, folder: Path) -> Outcome:
    document = {name: said for name, said in ran.document.items() if name not in NOISE}
    document.get("residual", {}).pop("out", None) if isinstance(document.get("residual"), dict) else None
    written = [path for place in sorted(folder.glob("out*")) for path in sorted(place.rglob("*"))]
    return Outcome(
        ran.code,
        json.dumps(document, sort_keys=True),
        tuple((path.relative_to(folder).as_posix(), path.read_bytes()) for path in written),
    )


@dataclass
class Trial:
    """Runs a command again and again on fresh copies of its inputs."""

    call: Call
    world: World
    folder: Path
    line: str
    tries: int = 0

    def fresh(self) -> Path:
        """A folder with all inputs in it."""
        self.tries += 1
        place = self.folder / str(self.tries)
        for name in ("base", "adapter", "merged"):
            shutil.copytree(getattr(self.world, name), place / name)
        (place / "base" / "LICENSE").write_text("Do what you want, whoever you are, with all of this.")
        write_json(place / "adapter" / "tokenizer.json", {"version": "1.0", "model": {}})
        return place

    def run(self, place: Path) -> Outcome:
        paths = {name: str(place / name) for name in ("base", "adapter", "merged", "out")}
        ran = self.call(*(part.format(**paths) for part in self.line.split()), "--json")
        assert "Traceback" not in ran.err
        return outcome(ran, place)


def check(trial: Trial, file: str, points: Callable[[int], Sequence[tuple[int, Change]]]) -> None:
    """Change a file before steps that are taken with it, one run for each.

    Args:
        trial: The command.
        file: The file.
        points: Which of so many steps, with what is done before each.
    """
    place = trial.fresh()
    counting = Watch(place / file, gone, -1)
    with watched(counting):
        old = trial.run(place)
    assert counting.steps > 2
    new: dict[Change, Outcome] = {}
    for at, change in points(counting.steps):
        if (at, change) == (0, gone):
            continue  # it was listed, and is not there at the first look: as if it never had been
        if change not in new:
            place = trial.fresh()
            change(place / file)
            new[change] = trial.run(place)
        place = trial.fresh()
        before = entries(place).keys()
        with watched(Watch(place / file, change, at)):
            found = trial.run(place)
        if found.code in refusals(trial.line, file, change):
            added = entries(place).keys() - before
            assert {name for name in added if not name.endswith(".new")} == set(), "something was left"
        else:
            assert found in (old, new[change]), f"{found.code} after {change.__name__} before step {at}"
        shutil.rmtree(place)


def refusals(line: str, file: str, change: Change) -> set[int]:
    """Exit codes that are right whenever a file has changed."""
    codes = {10}
    if change is gone:
        codes.add(2)  # at a second look by somebody else: it does not exist
    if "--roundtrip" in line and "adapter" in file:
        codes |= {
            1,
            23,
        }  # the round trip reads it anew: what comes out is not the base, or not what the undo file names
    return codes


def some(steps: int) -> list[tuple[int, Change]]:
    """A change before each of the first and last steps, and before some in between."""
    kinds = list(CHANGES.values())
    chosen = sorted({*range(3), *range(3, steps, max(1, steps // 8)), *range(max(0, steps - 3), steps)})
    return [(at, kinds[n % 5]) for n, at in enumerate(chosen)]


def every(steps: int) -> list[tuple[int, Change]]:
    """Every change before every step."""
    return [(at, change) for at in range(steps) for change in CHANGES.values()]


every_case = pytest.mark.parametrize(
    ("command", "file"), CASES, ids=[f"{name}-{Path(file).name}" for name, file in CASES]
)


@every_case
def test_r172_a_change_is_noticed_or_makes_no_difference(
    call: Call, world: World, tmp_path: Path, command: str, file: str
) -> None:
    """Never a mixture of old and new, and never a trace of what was refused."""
    check(Trial(call, world, tmp_path, COMMANDS[command][0]), file, some)


@pytest.mark.slow
@every_case
def test_r172_a_change_at_any_time_is_noticed(
    call: Call, world: World, tmp_path: Path, command: str, file: str
) -> None:
    check(Trial(call, world, tmp_path, COMMANDS[command][0]), file, every)


@pytest.mark.skipif(sys.platform != "linux", reason="units run in processes on Linux alone")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("command", ["merge", "unmerge", "verify"])
def test_r172_a_change_that_worker_processes_meet(
    call: Call, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, change: Change
) -> None:
    """While they read it; what they come to reaches whoever waits for them."""
    line, changed = COMMANDS[command]
    trial = Trial(call, world, tmp_path, line)
    place, parent, done = trial.fresh(), os.getpid(), tmp_path / "done"
    file, before, read_at = place / changed[0], entries(place).keys(), files.read_at

    def reading(*arguments: Any) -> int:
        if os.getpid() != parent:
            with suppress(FileExistsError):
                done.touch(exist_ok=False)
                change(file)
        return read_at(*arguments)

    monkeypatch.setattr(files, "read_at", reading)
    monkeypatch.setattr(workers, "can_fork", lambda: True)
    monkeypatch.setattr(workers, "SHARE", 1)
    trial.line += " --threads 2"
    assert trial.run(place).code == 10
    assert done.exists()
    assert {name for name in entries(place).keys() - before if not name.endswith(".new")} == set()


def test_r172_no_input_is_mapped_into_memory() -> None:
    """A mapped file that shrinks ends the process (SIGBUS). What workers share is no file: mmap(-1)."""
    package = Path(lora_cli.__file__).parent
    for source in package.rglob("*.py"):
        for call in ast.walk(ast.parse(source.read_text("utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("mmap.mmap", "mmap"):
                assert ast.unparse(call.args[0]) == "-1", source
            mapped = isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in ("memmap", "from_file")
            assert not mapped, source
