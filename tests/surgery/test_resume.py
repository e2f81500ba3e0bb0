"""A run that was cut off goes on: byte for byte what it would have been, and never after anything changed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

import lora_cli
from lora_cli import errors
from lora_cli.checkpoint import files
from lora_cli.checkpoint.journal import JOURNAL, Finished, Journal
from lora_cli.checkpoint.staged import StagedFile
from lora_cli.checkpoint.staging import OUTPUT, Staging
from lora_cli.progress import Progress
from lora_cli.surgery import execute, resuming
from lora_cli.surgery.resumption import Resumption

ROOT = Path(__file__).parents[2]
SHARDS = 3
Patch = pytest.MonkeyPatch


class Notes(Progress):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.said.append(text)


class Job:
    """Inputs, a place for outputs, and a way to have a run killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = tiny.write_base(folder / "base", shards=SHARDS)
        self.adapter = tiny.write_adapter(folder / "adapter")
        self.place = folder / "place"
        self.place.mkdir()
        self.out = self.place / "out"

    def merge(self, **how: Any) -> lora_cli.MergeResult:
        return lora_cli.merge(self.base, [self.adapter], self.out, threads=1, **how)

    def unmerge(self, **how: Any) -> lora_cli.UnmergeResult:
        return lora_cli.unmerge(self.folder / "merged", [self.adapter], self.out, threads=1, **how)

    def cut_off(self, run: Callable[..., object], after: int, **how: Any) -> Path:
        """Run in a process that is killed once so many files were noted; returns what it has left."""
        child = os.fork()
        if child == 0:
            stop_after(after)
            try:
                run(**how)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        (left,) = (path for path in self.place.iterdir() if path.is_dir())
        return left


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.fixture
def spied(monkeypatch: Patch) -> list[str]:
    """Names of the files that a run finishes itself."""
    written: list[str] = []
    was = Journal.note

    def note(self: Journal, one: Finished) -> None:
        written.append(one.name)
        was(self, one)

    monkeypatch.setattr(Journal, "note", note)
    return written


@pytest.mark.parametrize("after", range(1, SHARDS + 1))
@pytest.mark.parametrize("undo", [True, False])
def test_a_merge_that_was_killed_goes_on(job: Job, after: int, undo: bool) -> None:
    job.merge(undo=undo)
    expected = digests(job.out)
    shutil.rmtree(job.out)
    left = job.cut_off(job.merge, after, undo=undo, resume=True)
    kept = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (left / OUTPUT).iterdir()}
    done = noted(left)
    assert len(done) == after
    job.merge(undo=undo, resume=True)
    assert digests(job.out) == expected
    assert [path.name for path in job.place.iterdir()] == ["out"]
    for name in done:  # taken over, not made again
        status = (job.out / name).stat()
        assert (status.st_ino, status.st_mtime_ns) == kept[name]


@pytest.mark.parametrize("after", range(1, SHARDS + 1))
def test_an_unmerge_that_was_killed_goes_on(job: Job, after: int, spied: list[str]) -> None:
    lora_cli.merge(job.base, [job.adapter], job.folder / "merged", threads=1)
    spied.clear()
    left = job.cut_off(job.unmerge, after)  # noted without --resume too: its digests cost nothing
    result = job.unmerge(resume=True)
    assert len(spied) == SHARDS - after
    assert result.exact
    names = sorted(path.name for path in job.base.iterdir())
    assert digests(job.base) == {name: digest for name, digest in digests(job.out).items() if name in names}
    assert not left.exists()


@pytest.mark.parametrize("layout", ["wrapped", "residual"])
def test_an_injection_that_was_killed_goes_on(job: Job, layout: str) -> None:
    def inject(**how: Any) -> lora_cli.InjectResult:
        more = {"init": "olora", "base_out": job.place / "left"} if layout == "residual" else {"layout": "wrapped"}
        return lora_cli.inject(job.base, job.out, rank=2, threads=1, **more, **how)

    inject()
    expected = digests(job.place)
    for path in list(job.place.iterdir()):
        shutil.rmtree(path)
    child = os.fork()
    if child == 0:
        stop_after(2)
        inject(resume=True)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    notes = Notes()
    inject(resume=True, progress=notes)
    made = {name: digest for name, digest in digests(job.place).items() if not name.startswith(".")}
    assert made == expected
    assert any(said.startswith("checking 2 finished files") for said in notes.said)


def test_what_is_not_finished_is_made_again(job: Job, spied: list[str]) -> None:
    """Of two finished files one is damaged since: a byte of a tensor, a byte of what is gathered, or it is a link."""
    expected = merged_once(job)
    for harm in (flip_a_tensor, flip_the_gathered, put_a_link, cut_the_journal):
        left = job.cut_off(job.merge, 2)
        harm(left)
        spied.clear()
        notes = Notes()
        job.merge(resume=True, progress=notes)
        assert digests(job.out) == expected, harm.__name__
        shutil.rmtree(job.out)
        assert list(job.place.iterdir()) == []


def test_nothing_is_gone_on_with_after_an_input_or_option_changed(job: Job) -> None:
    merged_once(job)
    job.cut_off(job.merge, 2)
    before = digests(job.place)
    options = lora_cli.PlanOptions
    for how, word in (
        ({"options": options(weights=(0.5,))}, "the option weights is not what it was"),
        ({"options": options(dtype="bf16")}, "the option dtype is not what it was"),
        ({"undo": False}, "the option undo is not what it was"),
        ({"embed_adapter": True}, "the option embed_adapter is not what it was"),
    ):
        refused(job, before, word, **how)
    for path, change in (
        (job.base / "config.json", touched),
        (job.base / "new.txt", Path.touch),
        (job.adapter / "adapter_model.safetensors", copied),
        (job.base / "model-00002-of-00003.safetensors", rewritten_in_place),
    ):
        kept = path.stat().st_mtime_ns if path.exists() else None
        change(path)
        if kept is not None:
            os.utime(path, ns=(kept, kept))  # the time of the last change alone proves nothing
        refused(job, before, f"the input {path}")


def test_the_order_of_adapters_is_part_of_what_was_asked_for(job: Job) -> None:
    """The weights go with their places."""
    other = tiny.write_adapter(job.folder / "other", {k: t + 1 for k, t in tiny.adapter_tensors().items()})
    weights = lora_cli.PlanOptions(weights=(1.0, 0.5))

    def merge(*adapters: Path, resume: bool = False) -> None:
        lora_cli.merge(job.base, adapters, job.out, weights, resume=resume, threads=1)

    job.cut_off(lambda: merge(job.adapter, other), 2)
    with pytest.raises(errors.WrongInputError) as caught:
        merge(other, job.adapter, resume=True)
    assert caught.value.details == ("the order of the inputs is not what it was",)


def test_an_adapter_that_is_given_twice_has_both_of_its_places(job: Job) -> None:
    other = tiny.write_adapter(job.folder / "other", {k: t + 1 for k, t in tiny.adapter_tensors().items()})
    weights = lora_cli.PlanOptions(weights=(1.0, 0.5, 0.25))

    def merge(*adapters: Path, resume: bool = False) -> None:
        lora_cli.merge(job.base, adapters, job.out, weights, again=True, resume=resume, threads=1)

    job.cut_off(lambda: merge(job.adapter, job.adapter, other), 2)
    with pytest.raises(errors.WrongInputError, match="the order of the inputs is not what it was"):
        merge(job.adapter, other, job.adapter, resume=True)


@pytest.mark.parametrize("moment", ["checking", "looking for space", "recalling", "writing the rest"])
def test_a_run_that_fails_leaves_no_less_than_it_found(job: Job, moment: str, monkeypatch: Patch) -> None:
    expected = merged_once(job)
    left = job.cut_off(job.merge, 2)
    done = noted(left)
    places = {
        "checking": (resuming, "shard_digest"),
        "looking for space": (execute, "check_space"),
        "recalling": (Resumption, "begin"),
        "writing the rest": (StagedFile, "write"),
    }

    def fail(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*places[moment], fail)
        with pytest.raises(KeyboardInterrupt):
            job.merge(resume=True)
    (left,) = job.place.iterdir()
    assert noted(left) == done
    notes = Notes()
    job.merge(resume=True, progress=notes)
    assert any(said.startswith("checking 2 finished files") for said in notes.said)
    assert digests(job.out) == expected


def test_a_file_that_cannot_be_read_is_not_thrown_away(job: Job, monkeypatch: Patch) -> None:
    expected = merged_once(job)
    left = job.cut_off(job.merge, 2)
    done = noted(left)

    def broken(descriptor: int, buffer: memoryview, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        was = Staging.take_over

        def take_over(self: Staging, left: str, count: int) -> None:
            was(self, left, count)
            patch.setattr(files, "read_at", broken)

        patch.setattr(Staging, "take_over", take_over)
        with pytest.raises(errors.MalformedFileError, match=os.strerror(errno.EIO)):
            job.merge(resume=True)
    (left,) = job.place.iterdir()
    assert noted(left) == done
    job.merge(resume=True)
    assert digests(job.out) == expected


def test_any_flipped_bit_of_a_journal_is_noticed(job: Job) -> None:
    expected = merged_once(job)
    left = job.cut_off(job.merge, 2)
    kept = job.folder / "kept"
    shutil.copytree(left, kept)
    length = (left / JOURNAL).stat().st_size
    for bit in range(3, 8 * length, 8 * length // 60):
        shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(kept, left)
        data = bytearray((left / JOURNAL).read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        (left / JOURNAL).write_bytes(data)
        job.merge(resume=True)
        assert digests(job.out) == expected
        shutil.rmtree(job.out)


def test_nothing_is_taken_over_where_nobody_knows_whether_the_other_run_goes_on(job: Job, monkeypatch: Patch) -> None:
    left = job.cut_off(job.merge, 2)
    before = digests(left)

    def nothing(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", nothing)
    with pytest.raises(errors.UnsupportedError, match=left.name):
        job.merge(resume=True)
    assert digests(left) == before


def test_a_run_without_resume_begins_anew_and_tells_what_is_there(job: Job) -> None:
    expected = merged_once(job)
    left = job.cut_off(job.merge, 1)
    notes = Notes()
    job.merge(progress=notes)
    assert digests(job.out) == expected
    (said,) = (said for said in notes.said if left.name in said)
    assert "1 finished file:" in said
    assert "--resume" in said
    assert left.is_dir()


def test_resume_with_nothing_to_go_on_from_is_a_run(job: Job) -> None:
    expected, notes = merged_once(job), Notes()
    job.merge(resume=True, progress=notes)
    assert digests(job.out) == expected
    assert any("nothing here can be gone on with" in said for said in notes.said)


@pytest.mark.parametrize("resume", [True, False])
def test_an_error_leaves_finished_files_only_where_that_is_wanted(job: Job, resume: bool, monkeypatch: Patch) -> None:
    """The second file cannot be noted, as if the disk were full by then."""
    expected = merged_once(job)
    was, count = Journal.note, 0

    def note(self: Journal, one: Finished) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise errors.DiskFullError("The disk is full", file=one.name)
        was(self, one)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "note", note)
        notes = Notes()
        with pytest.raises(errors.DiskFullError):
            job.merge(resume=resume, progress=notes)
    assert len(list(job.place.iterdir())) == resume
    assert any(re.match(r"[12] finished files? stays? in", said) for said in notes.said) == resume
    job.merge(resume=True)
    assert digests(job.out) == expected
    assert [path.name for path in job.place.iterdir()] == ["out"]


def test_a_run_that_goes_on_can_be_cut_off_again(job: Job) -> None:
    expected = merged_once(job)
    job.cut_off(job.merge, 1)
    left = job.cut_off(job.merge, 1, resume=True)
    assert len((left / JOURNAL).read_text().splitlines()) == 3
    job.merge(resume=True)
    assert digests(job.out) == expected


def test_what_others_left_is_not_touched(job: Job) -> None:
    """Names that look alike, a link, a file: none of them is a run's of ours."""
    expected = merged_once(job)
    left = job.cut_off(job.merge, 2)
    (job.place / ".out.lora-cli-notes").mkdir()
    (job.place / ".out.lora-cli-0123456789ab").write_text("a file")
    (job.place / ".out.lora-cli-abcdefabcdef").symlink_to(left)
    (job.place / ".out2.lora-cli-abcdefabcdef").mkdir()
    job.merge(resume=True)
    assert digests(job.out) == expected
    assert sorted(path.name for path in job.place.iterdir()) == [
        ".out.lora-cli-0123456789ab",
        ".out.lora-cli-abcdefabcdef",
        ".out.lora-cli-notes",
        ".out2.lora-cli-abcdefabcdef",
        "out",
    ]


@pytest.mark.slow
def test_whole_processes_of_some_size_go_on() -> None:
    line = [sys.executable, str(ROOT / "scripts" / "cut_off.py"), "--megabytes", "256", "--shards", "4"]
    ran = subprocess.run(line, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("same digests") == 2


def merged_once(job: Job) -> dict[str, str]:
    """What the output is to be; and nothing is there again."""
    job.merge()
    expected = digests(job.out)
    shutil.rmtree(job.out)
    return expected


def refused(job: Job, before: dict[str, str], word: str, **how: Any) -> None:
    with pytest.raises(errors.WrongInputError) as caught:
        job.merge(resume=True, **how)
    assert any(detail.startswith(word) for detail in caught.value.details), caught.value.details
    assert digests(job.place) == {name: digest for name, digest in before.items() if not name.endswith("-lock")}


def stop_after(count: int) -> None:
    """Have this process killed once so many files were noted."""
    was, left = Journal.note, count

    def note(self: Journal, finished: Finished) -> None:
        nonlocal left
        was(self, finished)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.note = note  # type: ignore[method-assign]


def flip_last(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def first_done(left: Path) -> str:
    return noted(left)[0]


def noted(left: Path) -> list[str]:
    """Names of the files that a journal says are finished."""
    lines = (left / JOURNAL).read_text().splitlines()[1:]
    return [str(json.loads(line.partition(" ")[2])["name"]) for line in lines]


def flip_a_tensor(left: Path) -> None:
    flip_last(left / OUTPUT / first_done(left))


def flip_the_gathered(left: Path) -> None:
    (scratch,) = left.glob("scratch-*")
    flip_last(scratch)


def put_a_link(left: Path) -> None:
    file = left / OUTPUT / first_done(left)
    file.rename(left.parent.parent / "elsewhere")
    file.symlink_to(left.parent.parent / "elsewhere")


def cut_the_journal(left: Path) -> None:
    path = left / JOURNAL
    path.write_bytes(path.read_bytes()[:-20])


def touched(path: Path) -> None:
    path.write_text(path.read_text() + " ")


def copied(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy(path, other)
    other.replace(path)


def rewritten_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
