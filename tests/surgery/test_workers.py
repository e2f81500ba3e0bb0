"""Units side by side (R169): the same results inline, in processes, in threads; nothing is left however it ends."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from worker_world import LARGE, SHARED, TORCH_THREADS, WAYS, Patch, descriptors, go, needs_fork, nothing_stays, watched  # noqa: F401 (a fixture)

from lora_cli import errors
from lora_cli.errors import DiskFullError, LoraCliError
from lora_cli.surgery import forking
from lora_cli.surgery.workers import SHARE, run_units

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
