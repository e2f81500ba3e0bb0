"""What needs no arithmetic, done while torch loads: for a second the other cores have nothing else to do."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

from lora_cli.surgery.forking import NOT_TO_BE_HAD, become_worker, can_fork, forking, portable
from lora_cli.surgery.workers import SHARE

T = TypeVar("T")


def while_torch_loads(units: Sequence[T], work: Callable[[T], None], nbytes: Callable[[T], int]) -> int:
    """Load torch, with another process doing units meanwhile.

    Args:
        units: What can be done without torch, and done once more without harm.
        work: Does one of them.
        nbytes: Bytes of one of them.

    Returns:
        How many were done, from the first on; none where torch is there already, or another process not to be had.

    Raises:
        BaseException: What a unit came to.
    """
    if "torch" in sys.modules or not can_fork() or sum(map(nbytes, units)) < SHARE:
        return 0
    context = multiprocessing.get_context("fork")
    stop, (here, there) = mmap.mmap(-1, 1), context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(units, work, stop, there, os.getpid()), daemon=True)
    done: int | BaseException = 0
    try:
        with contextlib.suppress(*NOT_TO_BE_HAD), forking():
            child.start()
        there.close()
        import torch  # noqa: F401
    finally:
        stop[0] = 1
        if child.pid is not None:
            with contextlib.suppress(EOFError):  # it was killed, and so nothing was done
                done = here.recv()
            child.join()
        here.close()
    if isinstance(done, BaseException):
        raise done
    return done


def _work(units: Sequence[T], work: Callable[[T], None], stop: mmap.mmap, there: Connection, parent: int) -> None:
    become_worker(parent)
    count = 0
    try:
        for unit in units:
            if stop[0]:
                break
            work(unit)
            count += 1
    except BaseException as error:  # noqa: BLE001 (told to the parent, whatever it is)
        there.send(portable(error))
        return
    with contextlib.suppress(BrokenPipeError):
        there.send(count)
