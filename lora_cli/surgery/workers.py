"""Running work units side by side: in processes where the system can fork, else in threads.

A unit is thousands of calls into torch and numpy of some microseconds each, which give the interpreter's lock away and
want it back: two threads of one process wait for each other longer than they work. Forked processes share all that was
planned and loaded, and have a lock each. So a unit's result is all that reaches the caller: whatever else `work`
changes in memory may be lost.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from lora_cli.errors import LoraCliError

Unit = TypeVar("Unit")
Result = TypeVar("Result")
Tools = TypeVar("Tools")

SHARE = 8 << 20
"""Bytes of work for which another worker is worth starting."""

_PARENT_DEATH = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


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
    with one_torch_thread():
        todo = list(units)
        workers = min(threads, nbytes // SHARE, len(todo))
        if workers <= 1:
            tools = make_tools()
            for unit in todo:
                yield unit, work(unit, tools)
            return
        with _pool(_Job(todo, work, make_tools), workers) as (pool, do):
            for number, result in _results(pool, do, len(todo), 2 * workers):
                yield todo[number], pickle.loads(result)  # noqa: S301 (by our own process)


def _results(pool: Executor, do: Callable[[int], bytes], count: int, ahead: int) -> Iterator[tuple[int, bytes]]:
    """The results of units 0 to `count`, with never more than `ahead` of them waiting or running."""
    waiting = iter(range(count))
    running: dict[Future[Any], int] = {}
    try:
        with warnings.catch_warnings():
            # Python warns of threads that libraries keep; none of them holds a lock that a worker takes.
            warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
            for number in islice(waiting, ahead):
                running[pool.submit(do, number)] = number
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                number, result = running.pop(future), future.result()
                for following in islice(waiting, 1):
                    running[pool.submit(do, following)] = following
                yield number, result
    except BrokenProcessPool as error:
        raise killed() from error
    finally:
        for future in running:
            future.cancel()


def killed() -> LoraCliError:
    """The error that a worker process is gone without a word."""
    return LoraCliError(
        "A worker process was killed",
        hint="the system may have run out of memory: try --threads 1, or a smaller --memory",
    )


class _Job:
    """What workers do: shared with processes as they are forked, and with threads as it is."""

    def __init__(self, units: Sequence[Any], work: Callable[[Any, Any], Any], make_tools: Callable[[], Any]) -> None:
        self.stopped: Any = threading.Event()
        self._units = units
        self._work = work
        self._make_tools = make_tools
        self._tools = threading.local()

    def do(self, number: int) -> bytes:
        """Do a unit. Its result comes as bytes: torch would have tensors share memory, with a file for each."""
        if self.stopped.is_set():
            raise RuntimeError("another unit failed first")
        if not hasattr(self._tools, "made"):
            self._tools.made = self._make_tools()
        try:
            return pickle.dumps(self._work(self._units[number], self._tools.made))
        except Exception as error:
            raise portable(error) from error


_JOB: list[_Job] = []
"""In a worker process: its job."""


def _do(number: int) -> bytes:
    return _JOB[0].do(number)


def portable(error: BaseException) -> BaseException:
    """The error itself if it can go to another process, else one that says what it was."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (made here)
    except Exception:  # noqa: BLE001 (whatever it is that keeps it here)
        return LoraCliError("Internal error in a worker", found=f"{type(error).__name__}: {error}")
    return error


@contextmanager
def _pool(job: _Job, workers: int) -> Iterator[tuple[Executor, Callable[[int], bytes]]]:
    """Workers for a job; on leaving, units that have begun come to their end and no other begins."""
    if can_fork():
        context = multiprocessing.get_context("fork")
        job.stopped = context.Event()
        arguments = (job, os.getpid())
        pool: Executor = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=arguments)
        do = _do
    else:
        pool = ThreadPoolExecutor(workers, thread_name_prefix="lora-cli", initializer=_limit_torch)
        do = job.do
    with pool:
        try:
            yield pool, do
        finally:
            job.stopped.set()


def can_fork() -> bool:
    """Whether a forked process can do our work: none of Python's threads, and no accelerator, would be cut off."""
    torch = sys.modules.get("torch")
    return (
        sys.platform == "linux"
        and threading.active_count() == 1
        and not multiprocessing.current_process().daemon
        and not (torch is not None and torch.cuda.is_initialized())
    )


def begin_process(parent: int) -> None:
    """Prepare a worker process: it ends with its parent, and leaves what a terminal sends to all of them to it."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a pool that lost a worker ends the others by it
    ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before it could be bound to us
    gc.freeze()  # what is shared is not to be touched, and so copied, by the search for garbage


def _begin(job: _Job, parent: int) -> None:
    begin_process(parent)
    _limit_torch()
    _JOB.append(job)


def _limit_torch() -> None:
    import torch

    torch.set_num_threads(1)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch's own threads out of the way while units run; put everything back afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
