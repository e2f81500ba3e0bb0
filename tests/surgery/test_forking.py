"""Where processes are not to be had, what happens while they are forked, and what is done while torch loads."""

from __future__ import annotations

import builtins
import errno
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from worker_world import FAILED_FORKS, LARGE, Patch, go, needs_fork, nothing_stays  # noqa: F401 (a fixture)

from lora_cli.errors import DiskFullError
from lora_cli.surgery import ahead
from lora_cli.surgery.ahead import while_torch_loads
from lora_cli.surgery.workers import run_units

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
def loading(monkeypatch: Patch) -> list[str]:
    """As before torch is imported; that lasts until the other process has ended, unless this list says `at once`."""
    how: list[str] = []
    held, really = sys.modules["torch"], builtins.__import__

    def importing(name: str, *others: Any) -> Any:
        deadline = time.monotonic() + 20
        while name == "torch" and not how and any(map(alive, multiprocessing.active_children())):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return really(name, *others)

    class Loads(dict[str, Any]):
        def __contains__(self, name: object) -> bool:
            return name != "torch" and super().__contains__(name)

    monkeypatch.setattr(ahead, "sys", SimpleNamespace(modules=Loads(torch=held)))
    monkeypatch.setattr(ahead, "can_fork", lambda: True)
    monkeypatch.setattr(builtins, "__import__", importing)
    return how


def alive(process: Any) -> bool:
    return bool(process.is_alive())


@needs_fork
@pytest.mark.usefixtures("loading")
def test_units_are_done_while_torch_loads(tmp_path: Path) -> None:
    assert while_torch_loads(range(5), lambda unit: (tmp_path / str(unit)).touch(), lambda _: LARGE) == 5
    assert sorted(place.name for place in tmp_path.iterdir()) == list("01234")


@needs_fork
def test_no_other_unit_begins_when_torch_is_there(tmp_path: Path, loading: list[str]) -> None:
    loading.append("at once")

    def slow(unit: int) -> None:
        time.sleep(0.05)
        (tmp_path / str(unit)).touch()

    done = while_torch_loads(range(1000), slow, lambda _: LARGE)
    assert done < 20
    assert len(list(tmp_path.iterdir())) == done


@needs_fork
@pytest.mark.usefixtures("loading")
def test_little_is_not_done_ahead_and_nothing_where_no_process_is_to_be_had(monkeypatch: Patch) -> None:
    def never(unit: int) -> None:
        raise AssertionError(unit)

    assert while_torch_loads(range(5), never, lambda _: 1) == 0
    failing_fork(monkeypatch, 0)
    assert while_torch_loads(range(5), never, lambda _: LARGE) == 0


@needs_fork
@pytest.mark.usefixtures("loading")
def test_what_is_done_ahead_fails_as_itself_and_a_killed_process_has_done_nothing() -> None:
    def full(_: int) -> None:
        raise DiskFullError("The disk is full", file="model.safetensors")

    def gone(_: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(DiskFullError) as caught:
        while_torch_loads(range(5), full, lambda _: LARGE)
    assert caught.value.file == "model.safetensors"
    assert while_torch_loads(range(5), gone, lambda _: LARGE) == 0
