"""Running work units on threads: first error stops all, progress is told from the caller's thread.

torch's own threads are kept out of the way while units run, and everything global is put back afterwards.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

Unit = TypeVar("Unit")
Result = TypeVar("Result")
Tools = TypeVar("Tools")


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_units(
    units: Iterable[Unit],
    work: Callable[[Unit, Tools], Result],
    make_tools: Callable[[], Tools],
    threads: int,
) -> Iterator[tuple[Unit, Result]]:
    """Yield each unit with its result as it is done, in no fixed order.

    Args:
        units: What is to be done; taken one by one, so that a long list is never in memory as futures.
        work: Does one unit with the tools of its thread.
        make_tools: Makes what a thread keeps between units (buffers).
        threads: How many units run at once.

    Raises:
        BaseException: The first error of any unit, after the others have stopped.
    """
    local = threading.local()
    stopped = threading.Event()

    def one(unit: Unit) -> Result:
        if stopped.is_set():
            raise RuntimeError("another unit failed first")
        if not hasattr(local, "tools"):
            _one_torch_thread()
            local.tools = make_tools()
        return work(unit, local.tools)

    waiting = iter(units)
    running: dict[Future[Result], Unit] = {}
    with _torch_threads_kept(), ThreadPoolExecutor(threads, thread_name_prefix="lora-cli") as pool:
        try:
            for unit in islice(waiting, 2 * threads):
                running[pool.submit(one, unit)] = unit
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    unit = running.pop(future)
                    result = future.result()
                    for following in islice(waiting, 1):
                        running[pool.submit(one, following)] = following
                    yield unit, result
        finally:
            stopped.set()
            for future in running:
                future.cancel()


def _one_torch_thread() -> None:
    import torch

    torch.set_num_threads(1)


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
