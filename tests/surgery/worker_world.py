"""What tests of workers share: ways to run units, and a look at what is left behind."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import multiprocessing.synchronize
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lora_cli.surgery import workers
from lora_cli.surgery.workers import SHARE

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
