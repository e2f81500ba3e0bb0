"""Running work units side by side: in processes where the system can fork, else in threads.

A unit is thousands of calls into torch and numpy of some microseconds each, which give the interpreter's lock away and
want it back: two threads of one process wait for each other longer than they work. Forked processes have a lock each.
So a unit's result is all that reaches the caller: whatever else `work` changes in memory may be lost.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from lora_cli.errors import LoraCliError
from lora_cli.surgery.forking import NOT_TO_BE_HAD, become_worker, can_fork, forking, frozen, portable

Unit = TypeVar("Unit")
Result = TypeVar("Result")
Tools = TypeVar("Tools")

LOOK_SECONDS = 1.0
"""How often a wait for workers looks whether they can still be fed."""

SHARE = 8 << 20
"""Bytes of work for which another worker is worth starting."""


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_units(
    units: Iterable[Unit],
    work: Callable[[Unit, Tools], Result],
    make_tools: Callable[[], Tools],
    threads: int,
    *,
    nbytes: int,
) -> Iterator[tuple[Unit, Result]]:
    """Yield each unit with its result as it is done, in no fixed order.

    Args:
        units: What is to be done.
        work: Does one unit with the tools of its worker. Its result must be one that pickles.
        make_tools: Makes what a worker keeps between units (buffers).
        threads: How many units run at once, at most.
        nbytes: Bytes of all units; little work is not shared.

    Raises:
        BaseException: The first error of any unit, after the others have stopped.
    """
    todo = list(units)
    workers = min(threads, nbytes // SHARE, len(todo))
    with one_torch_thread():
        if workers <= 1:
            tools = make_tools()
            for unit in todo:
                yield unit, work(unit, tools)
            return
        forked = can_fork()
        with _Job(todo, work, make_tools) as job, frozen(), _losses(of_ours=forked) as lost:
            pool: Executor | None = _processes(job, workers) if forked else None
            do = job.do if pool is None else _do
            pool = pool or ThreadPoolExecutor(workers, thread_name_prefix="lora-cli", initializer=_limit_torch)
            for number, result in _results(pool, do, job, 2 * workers, lost):
                yield todo[number], pickle.loads(result)  # noqa: S301 (by our own process)


class _Job:
    """What workers do: shared with processes as they are forked, and with threads as it is."""

    def __init__(self, units: Sequence[Any], work: Callable[[Any, Any], Any], make_tools: Callable[[], Any]) -> None:
        self.units = units
        self._work = work
        self._make_tools = make_tools
        self._tools = threading.local()
        self._stopped = mmap.mmap(-1, 1)  # memory that forked processes share

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.close()

    def stop(self) -> None:
        """Let no other unit begin."""
        self._stopped[0] = 1

    def do(self, number: int) -> bytes:
        """Do a unit with the tools of this thread. The result is pickled: it may be in these, or be torch's own.

        torch would have tensors between processes share memory, and keep a file open for each.
        """
        if self._stopped[0]:
            raise RuntimeError("another unit failed first")
        if not hasattr(self._tools, "made"):
            self._tools.made = self._make_tools()
        return pickle.dumps(self._work(self.units[number], self._tools.made))


def _results(
    pool: Executor, do: Callable[[int], bytes], job: _Job, ahead: int, lost: Sequence[BaseException]
) -> Iterator[tuple[int, bytes]]:
    """The results of a job's units, with never more than `ahead` of these waiting or running; then the pool is shut."""
    waiting = iter(range(len(job.units)))
    running: dict[Future[Any], int] = {}
    with pool:
        try:
            for number in islice(waiting, ahead):
                running[pool.submit(do, number)] = number
            while running:
                for future in _done(running, lost):
                    number, result = running.pop(future), future.result()
                    for following in islice(waiting, 1):
                        running[pool.submit(do, following)] = following
                    yield number, result
        except BrokenProcessPool as error:
            raise LoraCliError(
                "A worker process was killed",
                hint="the system may have run out of memory: try --threads 1, or a smaller --memory",
            ) from error
        finally:
            job.stop()
            for future in running:
                future.cancel()


def _done(running: Collection[Future[Any]], lost: Sequence[BaseException]) -> set[Future[Any]]:
    """Wait for those that are done first. Without the thread that feeds the workers none would ever be."""
    while True:
        done, _ = wait(running, timeout=LOOK_SECONDS, return_when=FIRST_COMPLETED)
        if done:
            return done
        if lost:
            raise LoraCliError(
                "The system has no room for the workers",
                found=str(lost[0]) or type(lost[0]).__name__,
                hint="try --threads 1, or a smaller --memory",
            ) from lost[0]


@contextmanager
def _losses(*, of_ours: bool) -> Iterator[list[BaseException]]:
    """What threads that begin within it die of: those of a pool of processes, which does not notice.

    Where one did, the workers that wait for it are ended.
    """
    if not of_ours:
        yield []
        return
    threads, processes, before = {*threading.enumerate()}, {*multiprocessing.active_children()}, threading.excepthook
    lost: list[BaseException] = []

    def note(said: threading.ExceptHookArgs) -> None:
        if said.thread in threads or said.exc_value is None:
            before(said)
        else:
            lost.append(said.exc_value)

    threading.excepthook = note
    try:
        yield lost
    finally:
        threading.excepthook = before
        if lost:
            for process in {*multiprocessing.active_children()} - processes:
                process.kill()
                process.join()


def _processes(job: _Job, workers: int) -> ProcessPoolExecutor | None:
    """Worker processes for a job, all of them forked; None where they are not to be had."""
    try:
        with forking():
            context = multiprocessing.get_context("fork")
            pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(job, os.getpid()))
            pool.submit(os.getpid)  # the first task has them forked
    except NOT_TO_BE_HAD:
        return None
    return pool


_JOB: list[_Job] = []
"""In a worker process: its job."""


def _begin(job: _Job, parent: int) -> None:
    become_worker(parent)
    _limit_torch()
    _JOB.append(job)


def _do(number: int) -> bytes:
    try:
        return _JOB[0].do(number)
    except Exception as error:  # noqa: BLE001 (each goes on, as it is or as what it was)
        raise portable(error) from None


def _limit_torch() -> None:
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch's own threads, where it is there, out of the way while units run; put everything back afterwards."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
