"""Advice to the system's page cache. It changes no byte, and is left out where it is not to be had.

A file that is synced only when it is complete leaves the disk idle while it is made, and the processors while it is
synced. So each run of bytes is handed to the disk as soon as it is there. And what is larger than memory would push
everything else out of the cache, only to be pushed out itself: such files are forgotten behind the work.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

_CONTAINER = Path("/sys/fs/cgroup/memory.max")

_WRITE = 2
"""SYNC_FILE_RANGE_WRITE: start writing dirty pages, and wait for none (sync_file_range(2))."""


def start_writing(descriptor: int, offset: int, length: int) -> None:
    """Let the disk begin to write a range of a file. Errors are for the sync at the end to tell."""
    call = _sync_file_range()
    if call is not None:
        call(descriptor, offset, length, _WRITE)


def crowds(nbytes: int) -> bool:
    """Whether so many bytes, read and written, would fill more than half of the memory that there is."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return False
    with contextlib.suppress(OSError, ValueError):  # a container may have less; or "max", or no such file
        memory = min(memory, int(_CONTAINER.read_text()))
    return nbytes > memory // 2


def forget(descriptor: int, offset: int = 0, length: int = 0) -> None:
    """Say that a range of a file (to its end, if `length` is 0) will not be needed soon; unwritten pages stay."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    # Python has no function of its own for it.
    if not sys.platform.startswith("linux"):
        return None
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call
