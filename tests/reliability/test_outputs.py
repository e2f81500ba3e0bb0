"""Outputs and disks: where nothing may be written, whose modes are kept, what a reader sees meanwhile (R148 to R171).

Faults at single calls are in `test_fault_loop.py`, kills and signals in `test_kill_loop.py`.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from catalogue import check_refused, entries
from cli_world import Call, World, call_fixture, environment, process, world_fixture  # noqa: F401 (fixtures)
from fault_jobs import Jobs, Snapshot, jobs_fixture, quietly, snapshot, without_leftovers  # noqa: F401 (fixture)
from faults import PUBLISHING, At, Double, Operation
from tiny import write_base

from lora_cli.checkpoint import files

ROOT_USER = hasattr(os, "geteuid") and os.geteuid() == 0


@contextmanager
def mounted(place: Path, *how: str) -> Iterator[Path]:
    """Something mounted at a place; skips the test where that may not be done."""
    place.mkdir()
    if not ROOT_USER or shutil.which("mount") is None:
        pytest.skip("nothing can be mounted here")
    done = subprocess.run(["mount", *how, str(place)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.decode()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def merging(world: World, out: Path, *more: object) -> list[object]:
    return ["merge", world.base, world.adapter, "-o", out, *more]


# Places


def put_file(out: Path) -> None:
    out.write_text("somebody's")


def put_folder(out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("somebody's")


def put_more(world: World, out: Path) -> None:
    shutil.copytree(world.merged, out)
    (out / "thesis.txt").write_text("somebody's")


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["plain", "force"])
@pytest.mark.parametrize("put", [put_file, put_folder], ids=["file", "folder"])
def test_r148_what_exists_stays(
    call: Call, world: World, tmp_path: Path, put: Callable[[Path], None], force: tuple[str, ...]
) -> None:
    put(tmp_path / "out")
    words = "file stands where the output should go" if put is put_file else "exists already|out"
    check_refused(call, merging(world, tmp_path / "out", *force), 30, words, folder=tmp_path, inputs=[world.base])


def test_r148_force_replaces_only_what_is_ours_alone(call: Call, world: World, tmp_path: Path) -> None:
    put_more(world, tmp_path / "out")
    check_refused(call, merging(world, tmp_path / "out", "--force"), 30, "exists already|--force", folder=tmp_path)


def test_r148_what_somebody_adds_while_it_is_replaced_is_not_removed(jobs: Jobs) -> None:
    """Between the last look at the old output and its exchange, a file of somebody's appears in it."""
    job = jobs["merge over a merge"]
    for call in ("swap", "chmod"):
        job.prepare()
        theirs = job.place / "out" / "thesis.txt"

        def add(operation: Operation, call: str = call, theirs: Path = theirs) -> None:
            if operation.name == call and not theirs.exists() and not operation.path.endswith(".json"):
                theirs.write_text("somebody's")

        with Double(before=add).installed():
            ended = job.run()
        assert theirs.read_text() == "somebody's"
        assert ended.code == 30
        theirs.unlink()
        assert job.found() == job.before


@pytest.mark.parametrize("kind", ["the same", "a link", "a hard link", "mounted twice", "another case"])
def test_r149_the_output_is_an_input(call: Call, world: World, tmp_path: Path, kind: str) -> None:
    base = write_base(tmp_path / "base", shards=1)
    file, out = base / "model.safetensors", tmp_path / "out"
    line: list[object] = ["merge", base, world.adapter, "-o", out]
    if kind == "mounted twice":
        with mounted(out, "--bind", str(base)):
            check_refused(call, [*line, "--force"], 30, "into an input|base", folder=tmp_path)
            check_refused(call, [*line[:-1], out / "inner"], 30, "into an input|base", folder=tmp_path)
        return
    if kind == "the same":
        line[-1] = tmp_path / "." / "base"
    if kind == "a link":
        out.symlink_to(base)
    if kind == "another case":
        line[-1] = tmp_path / "BASE"
        if not (tmp_path / "BASE").exists():
            pytest.skip("names that differ by case are two here")
    if kind == "a hard link":
        os.link(file, tmp_path / "out.safetensors")
        line = ["merge", file, world.adapter, "-o", tmp_path / "out.safetensors", "--force"]
    check_refused(call, line, 30, "into an input|base", folder=tmp_path)


def test_r150_one_in_the_other(call: Call, world: World, tmp_path: Path) -> None:
    base = write_base(tmp_path / "around" / "base")
    for out in (base / "out", tmp_path / "around", base):
        check_refused(
            call, ["merge", base, world.adapter, "-o", out, "--force"], 30, "into an input|base", folder=tmp_path
        )


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["plain", "force"])
def test_r151_the_output_is_a_link(call: Call, world: World, tmp_path: Path, force: tuple[str, ...]) -> None:
    """A link is somebody's; what it points to may be a place of ours, and is to be named then."""
    shutil.copytree(world.merged, tmp_path / "real")
    for to, name in (("real", "out"), ("nowhere", "dangling"), ("loop", "loop")):
        (tmp_path / name).symlink_to(to)
        words = f"symbolic link|{name}"
        check_refused(call, merging(world, tmp_path / name, *force), 30, words, folder=tmp_path)


@pytest.mark.parametrize("what", ["around", "staging"])
def test_r152_a_folder_is_exchanged_for_a_link(jobs: Jobs, tmp_path: Path, what: str) -> None:
    """At any moment of the run: what is written goes where the folder is now, and never where the link leads."""
    job = jobs["merge"]
    victim, away = tmp_path / "victim", tmp_path / "away"
    for name in ("output/README.md", "output/model-00001-of-00003.safetensors", "out/config.json", "journal"):
        (victim / name).parent.mkdir(parents=True, exist_ok=True)
        (victim / name).write_text("somebody's")
    before = entries(victim)

    def exchange() -> None:
        folder = job.place if what == "around" else next(job.place.glob(".out.lora-cli-*/output")).parent
        folder.rename(away)
        folder.symlink_to(victim)

    log = job.log()
    made = next(at for at, one in enumerate(log, 1) if one.name == "create" and "/output/" in one.path)
    writing = [at for at, one in enumerate(log, 1) if one.name in ("create", "rename", "fsync", "unlink")]
    published = next(at for at, one in enumerate(log, 1) if one.name in PUBLISHING)
    for at in [at for at in writing[1::3] if what == "around" or made <= at <= published]:
        job.prepare()
        try:
            with Double(before=At(at, exchange)).installed():
                ended = job.run()
            assert entries(victim) == before
            assert ended.code in (0, 30, 32)
            found = without_leftovers(snapshot(away if what == "around" else job.place))
            assert found in ({}, job.complete), sorted(found)
        finally:
            if job.place.is_symlink():
                job.place.unlink()
            shutil.rmtree(away)


def test_r153_the_folder_around_is_missing_or_a_file(call: Call, world: World, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for around in ("missing", "file"):
        out = tmp_path / around / "out"
        check_refused(call, merging(world, out), 2, f"does not exist|{around}|make it", folder=tmp_path)


def test_r153_an_output_without_a_name(
    call: Call, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    for out in (".", "..", "../inner/.."):
        check_refused(call, merging(world, Path(out)), 30, "no name of its own|-o", folder=tmp_path)


def test_an_output_that_is_a_mount_point(call: Call, world: World, tmp_path: Path) -> None:
    """Nothing can take its place, so that is said before the work."""
    with mounted(tmp_path / "out", "-t", "tmpfs", "tmpfs"):
        check_refused(call, merging(world, tmp_path / "out"), 30, "mount point|out|folder in it", folder=tmp_path)


def test_r154_a_file_system_for_reading_only(call: Call, world: World, tmp_path: Path) -> None:
    with mounted(tmp_path / "place", "-t", "tmpfs", "-o", "ro", "tmpfs") as place:
        check_refused(call, merging(world, place / "out"), 32, "Read-only file system|out", folder=tmp_path)


@pytest.mark.skipif(ROOT_USER and shutil.which("setpriv") is None, reason="root may do anything")
def test_r154_an_old_output_that_may_not_be_changed(world: World, tmp_path: Path) -> None:
    """Its folder is read-only: whoever made it so is asked, and what was staged can be removed all the same."""
    shutil.copytree(world.merged, tmp_path / "out")
    (tmp_path / "out").chmod(0o555)
    before = entries(tmp_path)
    rights = "-dac_override,-dac_read_search"
    powerless = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"] if ROOT_USER else []
    line = [*powerless, sys.executable, "-m", "lora_cli", *map(str, merging(world, tmp_path / "out", "--force"))]
    ended = subprocess.run(line, env=environment(), capture_output=True, check=False, timeout=120)
    assert ended.returncode == 32, ended.stderr
    assert b"out: The output cannot be written: Permission denied" in ended.stderr
    assert entries(tmp_path) == before
    (tmp_path / "out").chmod(0o755)


# Space


def test_r155_too_little_space_is_told_before_the_work(
    call: Call, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda _: 1000)
    ran = check_refused(call, merging(world, tmp_path / "out"), 31, "space|1000 bytes free|expected", folder=tmp_path)
    assert "-o" in ran.err


def test_r157_a_limit_on_the_size_of_files(world: World, tmp_path: Path) -> None:
    """As a shell's `ulimit -f`, or a file system whose files are short."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))

    ran = process(*merging(world, tmp_path / "out"), preexec_fn=limit)
    assert ran.code == 32, ran.err
    assert ".safetensors: The output cannot be written: File too large" in ran.err
    assert "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == []


FULL = [[f"size={amount}k" for amount in range(8, 400, 8)], [f"nr_inodes={amount}" for amount in range(2, 60)]]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "force"), [("merge", False), ("merge", True), ("inject from weights", False)])
@pytest.mark.parametrize("amounts", FULL, ids=["bytes", "files"])
def test_r156_a_real_disk_that_is_full(
    jobs: Jobs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    force: bool,
    amounts: list[str],
) -> None:
    """Ever larger file systems, until one is large enough: no trace on each of those before."""
    job = jobs[name]
    monkeypatch.setattr(files, "free_bytes", lambda _: 1 << 40)  # or the plan would refuse most of them
    for number, amount in enumerate(amounts):
        with mounted(tmp_path / f"disk{number}", "-t", "tmpfs", "-o", amount, "tmpfs") as disk:
            if force:
                try:
                    shutil.copytree(jobs.merged, disk / "out")
                except shutil.Error:
                    continue
            before = snapshot(disk)
            line = [part.replace(str(job.place), str(disk)) for part in job.line]
            ended = quietly([*line, *(["--force"] if force else [])])
            assert without_leftovers(snapshot(disk)) == snapshot(disk)
            if ended.code == 0:
                assert number > 1
                assert bool(force) or snapshot(disk) == job.complete
                return
            assert ended.code == 31, ended
            assert snapshot(disk) == before
    pytest.fail("none was large enough")


# Other systems


def test_r161_a_rename_never_crosses_a_disk(jobs: Jobs) -> None:
    """The staging folder lies in the folder of the output; where renames fail all the same, nothing is left."""
    job = jobs["merge over a merge"]

    def crossing(operation: Operation) -> None:
        if operation.name in ("rename", "swap", "link"):
            assert Path(operation.path).is_relative_to(job.place)
            assert Path(operation.to).is_relative_to(job.place)
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    job.prepare()
    with Double(before=crossing).installed():
        ended = job.run()
    assert (ended.code, ended.document["code"]) == (32, "write")
    assert job.found() == job.before


@pytest.mark.parametrize("epoch", [0, -86400 * 365, 4102444800], ids=["1970", "1969", "2100"])
def test_r165_clocks_change_no_byte(jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    base = shutil.copytree(jobs.base, tmp_path / "base")
    for path in [*base.rglob("*"), base]:
        os.utime(path, (epoch, epoch))
    monkeypatch.setattr(time, "time", lambda: float(epoch))
    monkeypatch.setattr(time, "time_ns", lambda: epoch * 10**9)
    monkeypatch.setenv("TZ", "No/Where")
    (tmp_path / "place").mkdir()
    assert quietly(["merge", base, jobs.adapter, "-o", tmp_path / "place" / "out"]).code == 0
    assert snapshot(tmp_path / "place") == jobs["merge"].complete


# Modes


def modes(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["merge over a merge", "merge one file over a merge"])
def test_r162_what_is_replaced_gives_its_modes(jobs: Jobs, name: str) -> None:
    """And nobody sees more at any moment, neither of the file nor of the folder it is in."""
    job = jobs[name]
    job.prepare()
    for path in job.place.rglob("*"):
        path.chmod(0o750 if path.is_dir() else 0o640)
    before = modes(job.place)

    def look(operation: Operation) -> None:
        if operation.name == "pwrite" and operation.path.endswith(".safetensors"):
            assert stat.S_IMODE(os.stat(operation.path).st_mode) == 0o640  # noqa: PTH116
            around = [job.place / folder for folder in list(Path(operation.path).relative_to(job.place).parents)[:-1]]
            assert any(folder.stat().st_mode & 0o007 == 0 for folder in around)

    with Double(before=look).installed():
        assert job.run().code == 0
    assert modes(job.place) == before


def test_r162_an_empty_folder_keeps_its_mode(jobs: Jobs) -> None:
    job = jobs["merge"]
    job.prepare()
    (job.place / "out").mkdir(mode=0o700)
    assert job.run().code == 0
    assert stat.S_IMODE((job.place / "out").stat().st_mode) == 0o700


@pytest.mark.skipif(not ROOT_USER, reason="only root may give a folder to another group")
def test_r162_the_group_of_a_folder_goes_down(jobs: Jobs) -> None:
    job = jobs["merge"]
    job.prepare()
    os.chown(job.place, -1, 4321)
    job.place.chmod(0o2775)
    assert job.run().code == 0
    assert {path.stat().st_gid for path in job.place.rglob("*")} == {4321}


# Readers


def read_whole(place: Path) -> Snapshot | None:
    """What a reader finds who opens a folder and reads all in it; None if it was replaced meanwhile."""
    folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY)  # it is absent at no moment
    found: Snapshot = {}
    try:
        for name in os.listdir(folder):  # noqa: PTH208 (of a descriptor)
            status = os.stat(name, dir_fd=folder)
            if stat.S_ISREG(status.st_mode):
                with open(os.open(name, os.O_RDONLY, dir_fd=folder), "rb") as file:
                    found[name] = (status.st_mode, file.read())
        return found if os.fstat(folder).st_ino == place.stat().st_ino else None
    except FileNotFoundError:
        return None
    finally:
        os.close(folder)


def files_of(found: Snapshot) -> Snapshot:
    """The files right in `out`."""
    names = {name.removeprefix("out/"): what for name, what in found.items() if name.startswith("out/")}
    return {name: what for name, what in names.items() if "/" not in name and what[1] is not None}


def test_r171_a_reader_sees_the_old_or_the_new(jobs: Jobs) -> None:
    """While it is replaced over and over. Which of the two, and nothing else, at any moment."""
    job = jobs["merge over a merge"]
    job.prepare()
    old, new = files_of(job.before), files_of(job.complete)
    stop = job.place / "stop"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the runner's threads
        reader = os.fork()
    if reader == 0:
        code = 3
        try:
            signal.alarm(60)
            seen = [0, 0, 0]
            while not stop.exists():
                found = read_whole(job.place / "out")
                seen[2 if found is None else (old, new).index(found)] += 1
            code = 0 if min(seen[:2]) > 3 else 1
        except FileNotFoundError:
            code = 2
        finally:
            os._exit(code)

    def wait(operation: Operation) -> None:
        if operation.name in PUBLISHING:
            time.sleep(0.02)  # whatever there is to be seen in between, the reader sees

    for number in range(8):
        again = job.line if number % 2 == 0 else (*job.line, "--weight", "2")
        with Double(after=wait).installed():
            assert quietly(again).code == 0
    stop.touch()
    codes = {0: "", 1: "too few were read", 2: "it was absent", 3: "it was neither"}
    assert codes[os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1])] == ""
