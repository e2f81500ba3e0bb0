"""Every call to the system fails once, or from then on: the right code, nothing half made, nothing left (R156 to R160).

What CI tries is a sample of the calls, with all that give names; `-m slow` tries every one.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
from fault_jobs import NAMES, Ended, Job, Jobs, is_leftover, jobs_fixture, quietly, sample, without_leftovers  # noqa: F401
from faults import NEEDS_SPACE, Act, At, Double, Failing, Operation, both, can_meet

from lora_cli.surgery import workers

FULL = (errno.ENOSPC, errno.EDQUOT)
MUST_SUCCEED = {"create", "mkdir", "pwrite", "posix_fallocate", "fsync", "rename", "link", "swap"}
READING = {"open", "fstat", "preadv"}

every_job = pytest.mark.parametrize("name", NAMES)
sample_and_all = pytest.mark.parametrize("all_calls", [False, pytest.param(True, marks=pytest.mark.slow)])
once_or_for_good = pytest.mark.parametrize("good", [False, True], ids=["once", "for-good"])


def codes_for(met: Operation, number: int, place: str, *, good: bool) -> set[int]:
    """What the program may end with when a call failed."""
    if number in FULL:
        return {31}
    if good:  # it may go on from the first call, and meet it elsewhere
        return {10, 32}
    if not met.path.startswith(place):
        return {10}
    # What was written is read again as any file is.
    return {10, 32} if met.name in READING else {32}


def check(job: Job, ended: Ended, met: Operation, number: int, *, good: bool) -> None:
    """Hold what was promised against what is there."""
    found, told = job.found(), (met, ended)
    seen, left = without_leftovers(found), [name for name in found if is_leftover(name)]
    assert job.inputs_untouched(), told
    assert "Traceback" not in ended.err, told
    # Complete in its place, and only its name not synced: it cannot be taken back where nothing can be renamed.
    stays = good and seen == job.complete != job.before
    # What could not be taken away is left, under a name that says whose it is. A lock locks nobody out.
    lock = met.name == "unlink" and met.path.endswith("lock")
    assert not left or lock or good, (*told, left)
    if ended.code == 0:
        assert seen == job.complete, told
        # A lock that somebody else has left is not ours to open.
        assert good or met.name not in MUST_SUCCEED or met.path.endswith("-lock"), told
        return
    assert stays or seen == job.before or (good and left), told
    assert ended.code in codes_for(met, number, str(job.place), good=good), told
    assert ended.document["file"], told
    assert ended.document["message"], told
    assert not ended.err, told
    if left and seen != job.before:
        # Parts were put in their places, and then nothing could be renamed any more: neither on nor back.
        assert job.nothing_lost(), told
        assert "taken back" in str(ended.document["details"]), told
        again = job.run_again()
        assert (again.code, without_leftovers(job.found())) == (0, job.complete), (told, again)


def descriptors() -> int:
    """How many files this process has open."""
    return len(list(Path("/dev/fd").iterdir()))


def share_of(job: Job, number: int, *, good: bool) -> int:
    """One of how many kinds of calls is enough: all of them for one job, and a part for all others."""
    return 1 if job.name == "merge" and number == errno.EIO and not good else 2 if number == errno.ENOSPC else 6


def loop(job: Job, number: int, *, good: bool, all_calls: bool, besides: Act = lambda _: None) -> int:
    """Let one call of each run fail, and see the next run succeed; returns how many calls there are."""
    calls = [operation for operation in job.log(besides) if can_meet(operation, number)]
    for at in sample(calls, number + good, share=share_of(job, number, good=good), all_calls=all_calls):
        job.prepare()
        failing, opened = Failing(number, at, good=good), descriptors()
        with Double(before=both(failing, besides)).installed():
            ended = job.run()
        assert failing.met is not None
        assert descriptors() <= opened, failing.met
        check(job, ended, failing.met, number, good=good)
    ended = job.run_again()
    assert (ended.code, without_leftovers(job.found())) == (0, job.complete), ended
    return len(calls)


@every_job
@sample_and_all
@once_or_for_good
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["R156-full", "R158-broken"])
def test_a_call_fails(jobs: Jobs, name: str, number: int, good: bool, all_calls: bool) -> None:
    assert loop(jobs[name], number, good=good, all_calls=all_calls) > 20


@sample_and_all
@pytest.mark.skipif(sys.platform != "linux", reason="workers are processes on Linux alone")
def test_a_call_fails_in_some_process(jobs: Jobs, monkeypatch: pytest.MonkeyPatch, all_calls: bool) -> None:
    """R156. Two workers write; the call that fails is counted over all of them."""
    job = jobs["merge"]
    monkeypatch.setattr(workers, "SHARE", 1)
    monkeypatch.setattr(workers, "can_fork", lambda: True)  # a test runner's threads hold no lock that workers take
    counter = multiprocessing.get_context("fork").Value("i", 0)
    failed = 0
    for at in range(1, 90, 1 if all_calls else 7):

        def act(operation: Operation, at: int = at) -> None:
            if operation.name in NEEDS_SPACE:
                with counter.get_lock():
                    counter.value += 1
                    if counter.value != at:
                        return
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        counter.value = 0
        job.prepare()
        with Double(before=act).installed():
            ended = quietly(job.line, threads=2)
        assert job.inputs_untouched()
        if counter.value < at:
            assert (ended.code, job.found()) == (0, job.complete), ended
            break
        failed += 1
        assert (ended.code, job.found()) == (31, job.before), ended
        assert ended.document["file"], ended
    assert failed > 8


OTHERS = {
    "R157-quota": errno.EDQUOT,
    "R157-file-too-large": errno.EFBIG,
    "R154-read-only": errno.EROFS,
    "R163-stale": errno.ESTALE,
    "denied": errno.EACCES,
    "no-memory": errno.ENOMEM,
}


@sample_and_all
@pytest.mark.parametrize("number", OTHERS.values(), ids=OTHERS)
def test_a_call_fails_otherwise(jobs: Jobs, number: int, all_calls: bool) -> None:
    loop(jobs["merge over a merge"], number, good=False, all_calls=all_calls)


def only(name: str, act: Act) -> Act:
    """What is done at these calls alone."""
    return lambda operation: act(operation) if operation.name == name else None


def lacking(*names: str) -> Act:
    """A system that has not these calls; `sync` is that of folders."""

    def refuse(operation: Operation) -> None:
        of_folder = operation.name == "fsync" and Path(operation.path).is_dir()
        if ("sync" if of_folder else operation.name) in names:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    return refuse


@every_job
def test_a_system_that_lacks_calls(jobs: Jobs, name: str) -> None:
    """R160, R163. Space that is not reserved, folders that are not synced, names not exchanged, locks that are none."""
    job = jobs[name]
    for lacks in ("posix_fallocate", "copy_file_range", "swap", "link", "flock", "sync"):
        job.prepare()
        with Double(before=lacking(lacks)).installed():
            assert job.run().code == 0, lacks
        assert job.found() == job.complete, lacks


@pytest.mark.parametrize("name", [name for name in NAMES if "over" in name])
@sample_and_all
@once_or_for_good
@pytest.mark.parametrize("lacks", [("swap",), ("swap", "link")], ids=["no-exchange", "no-links"])
def test_a_call_fails_on_a_lesser_system(
    jobs: Jobs, name: str, lacks: tuple[str, ...], good: bool, all_calls: bool
) -> None:
    """What stood there comes back also where two names cannot be exchanged in one step."""
    loop(jobs[name], errno.ENOSPC, good=good, all_calls=all_calls, besides=lacking(*lacks))


@every_job
@sample_and_all
def test_a_part_is_read_or_written(jobs: Jobs, name: str, all_calls: bool) -> None:
    """R159. A call that moves fewer bytes than it was asked for is followed by another."""
    job, counting = jobs[name], At(0)
    job.prepare()
    with Double(short=lambda operation: not counting(operation)).installed():
        assert job.run().code == 0
    assert job.found() == job.complete, "all of them short"
    for at in range(1, counting.calls + 1) if all_calls else ():
        job.prepare()
        with Double(short=At(at)).installed():
            assert job.run().code == 0
        assert job.found() == job.complete, at


def test_a_failed_sync_is_never_tried_again(jobs: Jobs) -> None:
    """R158. Its pages may be lost, and a second sync would say that all is well."""
    job = jobs["merge"]
    synced = [at for at, operation in enumerate(job.log(), 1) if operation.name == "fsync"]
    assert len(synced) > 5
    for at in range(1, len(synced) + 1):
        job.prepare()
        failing = Failing(errno.EIO, at)
        double = Double(before=only("fsync", failing))
        with double.installed():
            assert job.run().code == 32
        assert failing.met is not None
        syncs = [operation for operation in double.log if operation.name == "fsync"]
        assert syncs[at - 1] == failing.met
        # Files of the work are synced for each file that is done, and read again before they are believed.
        assert failing.met not in syncs[at:] or "/output/" not in failing.met.path
