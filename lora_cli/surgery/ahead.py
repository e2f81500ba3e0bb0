"""What needs no arithmetic, done while torch loads: for a second the other cores have nothing else to do."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from lora_cli.surgery.workers import SHARE, begin_process, can_fork, killed, portable

T = TypeVar("T")


def while_torch_loads(units: Sequence[T], work: Callable[[T], None], nbytes: Callable[[T], int]) -> int:
    """Load torch, with another process doing units meanwhile.

    Args:
        units: What can be done without torch.
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
    stop, (here, there) = context.Event(), context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(units, work, stop, there, os.getpid()), daemon=True)
    child.start()
    there.close()
    try:
        import torch  # noqa: F401
    finally:
        stop.set()
        try:
            done = here.recv()
        except EOFError:
            done = killed()
        child.join()
    if isinstance(done, BaseException):
        raise done
    return int(done)


def _work(units: Sequence[T], work: Callable[[T], None], stop: Any, there: Connection, parent: int) -> None:
    begin_process(parent)
    count = 0
    try:
        for unit in units:
            if stop.is_set():
                break
            work(unit)
            count += 1
    except BaseException as error:  # noqa: BLE001 (told to the parent, whatever it is)
        there.send(portable(error))
        return
    with contextlib.suppress(BrokenPipeError):
        there.send(count)
