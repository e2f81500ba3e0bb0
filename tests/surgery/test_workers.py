"""Units side by side: the same results inline, in processes and in threads, and nothing left behind however it ends."""

from __future__ import annotations

import contextlib
import errno
import gc
import multiprocessing
import multiprocessing.synchronize
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_cli import errors
from lora_cli.errors import DiskFullError, LoraCliError
from lora_cli.surgery import ahead, forking, workers
from lora_cli.surgery.ahead import while_torch_loads
from lora_cli.surgery.workers import SHARE, run_units

Patch = pytest.MonkeyPatch

LARGE = 64 * SHARE
TORCH_THREADS = 3
LINUX = sys.platform == "linux" and hasattr(os, "fork")

needs_fork = pytest.mark.skipif(not LINUX, reason="units run in processes on Linux alone")
WAYS = ["inline", "threads", pytest.param("processes", marks=needs_fork)]
SHARED = WAYS[1:]


def go(patch: Patch, way: str) -> int:
    """Let units run this way; returns how many bytes of work to tell of.

    Under pytest-xdist there are other threads, and `can_fork` would say no. Here it is safe to fork all the same:
    those threads wait for messages, units take no lock that one of them could hold, and workers end by `os._exit`.
    """
    patch.setattr(workers, "can_fork", lambda: way == "processes")
    return 0 if way == "inline" else LARGE


@contextlib.contextmanager
def watched(seconds: float) -> Iterator[None]:
    """Fail, rather than hang, where workers do not come to their end: they are killed after so long."""
    late = []

    def kill() -> None:
        late.extend(multiprocessing.active_children())
        for worker in late:
            worker.kill()

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        assert late == []


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """However units end: torch has its threads again, and no child, thread or open file is left."""
    before, files, threads = torch.get_num_threads(), descriptors(), threading.active_count()
    torch.set_num_threads(TORCH_THREADS)
    FAILED_FORKS.clear()
    try:
        with watched(60):
            yield
        assert torch.get_num_threads() == TORCH_THREADS
        assert children() == []
        assert threading.active_count() == threads
        if descriptors() > files:
            gc.collect()  # what an error holds goes with it
        assert descriptors() <= files + 4 * len(FAILED_FORKS)
        assert not workers._JOB
    finally:
        torch.set_num_threads(before)


FAILED_FORKS: list[int] = []
"""Python itself loses two pipes with each fork that fails."""


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if LINUX else 0  # noqa: PTH208 (names are all that is wanted)


def children() -> list[str]:
    """Forked children of this process that live, or that nobody has waited for; it waits for none of them."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat") if LINUX else ():
        try:
            name, _, rest = place.read_text().rpartition(")")
            line = place.with_name("cmdline").read_bytes()
        except OSError:
            continue  # it ended meanwhile
        ours = line in (b"", Path("/proc/self/cmdline").read_bytes())
        if int(rest.split()[1]) == os.getpid() and ours:
            found.append(name)
    return found


# Results


@pytest.mark.parametrize("way", WAYS)
def test_every_unit_comes_once_with_its_result(way: str, monkeypatch: Patch) -> None:
    def work(unit: int, tools: list[str]) -> tuple[int, list[str]]:
        return unit * unit, tools

    nbytes = go(monkeypatch, way)
    found = list(run_units(range(40), work, lambda: ["made"], 3, nbytes=nbytes))
    assert sorted(found) == [(unit, (unit * unit, ["made"])) for unit in range(40)]


@pytest.mark.parametrize("way", WAYS)
def test_no_units_are_no_work(way: str, monkeypatch: Patch) -> None:
    assert list(run_units([], lambda unit, _: unit, list, 3, nbytes=go(monkeypatch, way))) == []


def where(_unit: int, tools: list[int]) -> tuple[int, int, int, int]:
    """Process, thread, threads of torch, and how many units these tools have seen."""
    tools.append(0)
    time.sleep(0.005)
    return os.getpid(), threading.get_ident(), torch.get_num_threads(), len(tools)


@pytest.mark.parametrize("way", WAYS)
def test_workers_are_no_more_than_asked_for_and_keep_their_tools(way: str, monkeypatch: Patch) -> None:
    found = [result for _, result in run_units(range(24), where, list, 3, nbytes=go(monkeypatch, way))]
    processes = {process for process, _, _, _ in found}
    used = {(process, thread) for process, thread, _, _ in found}
    if way == "processes":
        assert os.getpid() not in processes
        assert 1 <= len(processes) <= 3
    else:
        assert processes == {os.getpid()}
        assert (os.getpid(), threading.get_ident()) in used if way == "inline" else len(used) <= 3
    assert {limit for _, _, limit, _ in found} == {1}
    for each in used:
        counts = sorted(count for process, thread, _, count in found if (process, thread) == each)
        assert counts == list(range(1, len(counts) + 1))


@needs_fork
@pytest.mark.parametrize(
    ("nbytes", "threads", "most"), [(2 * SHARE + 5, 8, 2), (LARGE, 2, 2), (2 * SHARE - 1, 8, 0), (LARGE, 1, 0)]
)
def test_little_work_is_not_shared(nbytes: int, threads: int, most: int, monkeypatch: Patch) -> None:
    go(monkeypatch, "processes")
    processes = {result[0] for _, result in run_units(range(16), where, list, threads, nbytes=nbytes)}
    assert os.getpid() in processes if not most else len(processes - {os.getpid()}) in range(1, most + 1)
    assert len(processes) <= max(1, most)


def test_another_living_thread_forbids_to_fork() -> None:
    ended = threading.Event()
    other = threading.Thread(target=ended.wait)
    other.start()
    try:
        assert not forking.can_fork()
        found = [result[0] for _, result in run_units(range(8), where, list, 3, nbytes=LARGE)]
    finally:
        ended.set()
        other.join()
    assert found == [os.getpid()] * 8


@pytest.mark.parametrize("way", SHARED)
def test_tensors_arrive_as_copies_of_their_own(way: str, monkeypatch: Patch) -> None:
    def work(unit: int, buffer: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return buffer.fill_(unit), {"bf16": torch.arange(unit, dtype=torch.bfloat16)}

    nbytes = go(monkeypatch, way)
    before = descriptors()
    found = dict(run_units(range(40), work, lambda: torch.zeros(999), 3, nbytes=nbytes))
    assert descriptors() <= before + 3  # memory that is shared keeps a file open for each tensor
    for unit, (filled, more) in found.items():
        assert torch.equal(filled, torch.full((999,), float(unit)))
        assert torch.equal(more["bf16"], torch.arange(unit, dtype=torch.bfloat16))
        assert not filled.untyped_storage().is_shared()


def test_works_in_two_threads_do_not_mix(monkeypatch: Patch) -> None:
    """As where a program merges two checkpoints at once."""
    nbytes, both, found = go(monkeypatch, "threads"), threading.Barrier(2), {}

    def run(name: str) -> None:
        def work(unit: int, _: object) -> tuple[str, int]:
            return name, unit

        units = run_units(range(12), work, list, 2, nbytes=nbytes)
        first = next(units)
        both.wait(20)
        found[name] = [first, *units]

    runs = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    for each in runs:
        each.start()
    for each in runs:
        each.join()
    for name in ("one", "two"):
        assert sorted(found[name]) == [(unit, (name, unit)) for unit in range(12)]


# Errors


FULL = {"file": "model.safetensors", "tensor": "x.weight", "expected": "5", "found": "4", "hint": "wait"}


@pytest.mark.parametrize("way", WAYS)
def test_an_error_arrives_with_all_that_it_says(way: str, monkeypatch: Patch) -> None:
    def work(unit: int, _: object) -> int:
        if unit == 3:
            raise DiskFullError("Full", details=["one", "two"], **FULL)
        return unit

    with pytest.raises(LoraCliError) as caught:
        list(run_units(range(9), work, list, 3, nbytes=go(monkeypatch, way)))
    error = caught.value
    assert (type(error), error.exit_code, error.code) == (DiskFullError, 31, "disk-full")
    assert (error.message, error.details) == ("Full", ("one", "two"))
    assert {name: getattr(error, name) for name in FULL} == FULL
    assert str(error) == str(DiskFullError("Full", details=["one", "two"], **FULL))


@pytest.mark.parametrize("way", WAYS)
def test_other_errors_arrive_as_they_are(way: str, monkeypatch: Patch) -> None:
    def work(unit: int, _: object) -> float:
        return 1 / (unit - 2)

    with pytest.raises(ZeroDivisionError):
        list(run_units(range(9), work, list, 3, nbytes=go(monkeypatch, way)))


@pytest.mark.parametrize("way", WAYS)
def test_after_an_error_no_other_unit_begins(way: str, tmp_path: Path, monkeypatch: Patch) -> None:
    """Those that had begun come to their end; the worker that failed may have begun one more before it was told."""

    def work(unit: int, _: object) -> None:
        (tmp_path / str(unit)).touch()
        if unit == 0:
            wait_for(lambda: way == "inline" or {"1", "2"} <= set(os.listdir(tmp_path)))  # noqa: PTH208
            raise DiskFullError("Full")
        time.sleep(0.6)
        (tmp_path / f"{unit} ended").touch()

    with pytest.raises(DiskFullError):
        list(run_units(range(50), work, list, 3, nbytes=go(monkeypatch, way)))
    names = {path.name for path in tmp_path.iterdir()}
    begun = {int(name) for name in names if name.isdigit()}
    assert begun <= ({0} if way == "inline" else {0, 1, 2, 3})
    assert {f"{unit} ended" for unit in begun - {0}} == {name for name in names if not name.isdigit()}


def wait_for(ready: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("way", WAYS)
def test_an_abandoned_run_ends_its_workers(way: str, tmp_path: Path, monkeypatch: Patch) -> None:
    def work(unit: int, _: object) -> int:
        (tmp_path / str(unit)).touch()
        time.sleep(0.05)
        return unit

    run = run_units(range(500), work, list, 3, nbytes=go(monkeypatch, way))
    next(run)
    assert torch.get_num_threads() == 1
    run.close()  # type: ignore[attr-defined]
    assert torch.get_num_threads() == TORCH_THREADS
    begun = len(list(tmp_path.iterdir()))
    assert begun <= 12
    time.sleep(0.1)
    assert len(list(tmp_path.iterdir())) == begun


@pytest.mark.parametrize("way", SHARED)
def test_workers_do_not_run_far_ahead_of_who_takes_their_results(way: str, tmp_path: Path, monkeypatch: Patch) -> None:
    def work(unit: int, _: object) -> int:
        (tmp_path / str(unit)).touch()
        return unit

    run = run_units(range(100), work, list, 3, nbytes=go(monkeypatch, way))
    next(run)
    time.sleep(0.2)
    assert len(list(tmp_path.iterdir())) <= 12  # two for each worker wait, and some are done
    assert len(list(run)) == 99


@needs_fork
def test_a_worker_that_is_killed_is_named_as_that(monkeypatch: Patch) -> None:
    def work(unit: int, _: object) -> int:
        if unit == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return unit

    with watched(15), pytest.raises(LoraCliError, match="worker process was killed") as caught:
        list(run_units(range(30), work, list, 3, nbytes=go(monkeypatch, "processes")))
    assert caught.value.hint is not None
    assert "--threads 1" in caught.value.hint
    assert caught.value.exit_code == 70


@needs_fork
def test_a_worker_that_is_killed_while_it_waits_does_not_stop_the_others(tmp_path: Path, monkeypatch: Patch) -> None:
    """It may hold the lock of the queue, and then no other gets what tells it to end."""

    def work(unit: int, _: object) -> int:
        place = tmp_path / str(unit)
        place.with_suffix(".new").write_text(str(os.getpid()))
        place.with_suffix(".new").rename(place)
        other = tmp_path / str(1 - unit)
        wait_for(other.exists)
        if unit == 1:
            time.sleep(0.3)  # the other has done its unit, and waits
            os.kill(int(other.read_text()), signal.SIGKILL)
            time.sleep(0.5)
        return unit

    with watched(4), pytest.raises(LoraCliError, match="worker process was killed"):
        list(run_units(range(2), work, list, 2, nbytes=go(monkeypatch, "processes")))


@needs_fork
def test_what_a_terminal_sends_is_left_to_the_parent(monkeypatch: Patch) -> None:
    def work(unit: int, _: object) -> int:
        for number in (signal.SIGINT, signal.SIGHUP):
            os.kill(os.getpid(), number)
        return unit

    found = list(run_units(range(6), work, list, 3, nbytes=go(monkeypatch, "processes")))
    assert sorted(found) == [(unit, unit) for unit in range(6)]


# In a process of its own, which has no other thread: so units are forked without being told to.
SLEEPING = """
import os, sys, time
from lora_cli.surgery.workers import run_units

def work(unit, tools):
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(100)

list(run_units(range(4), work, list, 2, nbytes=1 << 30))
"""


@needs_fork
def test_workers_end_with_their_parent() -> None:
    started = subprocess.Popen([sys.executable, "-c", SLEEPING], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    found: list[int] = []
    try:
        found += [int(started.stdout.readline()) for _ in range(2)]
        assert started.pid not in found
        assert all(map(lives, found))
        started.kill()
        started.wait(20)
        wait_for(lambda: not any(map(lives, found)))
    finally:
        for process in filter(lives, [started.pid, *found]):
            os.kill(process, signal.SIGKILL)
        started.communicate()


def lives(process: int) -> bool:
    """Whether a process runs; one that ended, and that nobody has waited for, does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


# Errors as they travel


def every_error(kind: type[LoraCliError] = LoraCliError) -> Iterator[type[LoraCliError]]:
    yield kind
    for below in kind.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from every_error(below)


@pytest.mark.parametrize("kind", list(every_error()))
def test_every_error_travels_between_processes(kind: type[LoraCliError]) -> None:
    error: Any
    if kind is errors.Interrupted:
        error = errors.Interrupted(15, "the output")
    else:
        error = kind("It is so", details=["one", "two"], **FULL)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 (our own)
    assert type(again) is kind
    assert vars(again) == vars(error)
    assert (again.args, again.exit_code, again.code) == (error.args, error.exit_code, error.code)
    assert str(again) == str(error)


# Where processes are not to be had


def failing_fork(patch: Patch, after: int) -> None:
    """From the fork with this number on there are no more processes."""
    fork, left = os.fork, [after]

    def limited() -> int:
        if not left[0]:
            FAILED_FORKS.append(1)
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        left[0] -= 1
        return fork()

    patch.setattr(os, "fork", limited)


@needs_fork
@pytest.mark.parametrize("after", [0, 1, 2])
def test_where_no_more_processes_are_to_be_had_units_run_in_threads(after: int, monkeypatch: Patch) -> None:
    nbytes = go(monkeypatch, "processes")
    failing_fork(monkeypatch, after)
    found = dict(run_units(range(9), lambda unit, _: (unit, os.getpid()), list, 3, nbytes=nbytes))
    assert found == {unit: (unit, os.getpid()) for unit in range(9)}


@needs_fork
def test_without_semaphores_units_run_in_threads(monkeypatch: Patch) -> None:
    nbytes = go(monkeypatch, "processes")

    def none(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", none)
    found = dict(run_units(range(5), lambda _, __: os.getpid(), list, 3, nbytes=nbytes))
    assert set(found.values()) == {os.getpid()}


@needs_fork
def test_signals_wait_while_processes_are_forked(monkeypatch: Patch) -> None:
    """Between fork and the worker's own first line a child would unwind what is its parent's."""
    nbytes, asked = go(monkeypatch, "processes"), {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    fork, seen = os.fork, []

    def watched_fork() -> int:
        seen.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()) & asked)
        return fork()

    monkeypatch.setattr(os, "fork", watched_fork)
    masks = run_units(
        range(6), lambda _, __: signal.pthread_sigmask(signal.SIG_BLOCK, ()) & asked, list, 3, nbytes=nbytes
    )
    assert [mask for _, mask in masks] == [set()] * 6
    assert seen == [asked] * 3
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & asked


# While torch loads


@pytest.fixture
def without_torch(monkeypatch: Patch) -> None:
    """As before torch is imported, which is then quick."""
    held = sys.modules["torch"]

    class Loads(dict[str, Any]):
        def __contains__(self, name: object) -> bool:
            return name != "torch" and super().__contains__(name)

    monkeypatch.setattr(ahead, "sys", SimpleNamespace(modules=Loads(torch=held)))
    monkeypatch.setattr(ahead, "can_fork", lambda: True)


def eventually(place: Path, many: int) -> Callable[[int], None]:
    def work(unit: int) -> None:
        (place / str(unit)).touch()

    return work


@needs_fork
@pytest.mark.usefixtures("without_torch")
def test_units_are_done_while_torch_loads(tmp_path: Path) -> None:
    done = while_torch_loads(range(5), eventually(tmp_path, 5), lambda _: LARGE)
    assert sorted(int(place.name) for place in tmp_path.iterdir()) == list(range(done))


@needs_fork
@pytest.mark.usefixtures("without_torch")
def test_little_is_not_done_ahead_and_nothing_where_no_process_is_to_be_had(monkeypatch: Patch) -> None:
    def never(unit: int) -> None:
        raise AssertionError(unit)

    assert while_torch_loads(range(5), never, lambda _: 1) == 0
    failing_fork(monkeypatch, 0)
    assert while_torch_loads(range(5), never, lambda _: LARGE) == 0


@needs_fork
@pytest.mark.usefixtures("without_torch")
def test_what_is_done_ahead_fails_as_itself_and_a_killed_process_has_done_nothing() -> None:
    def full(_: int) -> None:
        raise DiskFullError("The disk is full", file="model.safetensors")

    def gone(_: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with contextlib.suppress(DiskFullError):  # it may be stopped before it has begun
        assert while_torch_loads(range(5), full, lambda _: LARGE) == 0
    assert while_torch_loads(range(5), gone, lambda _: LARGE) == 0
