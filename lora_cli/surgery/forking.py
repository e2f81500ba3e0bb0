"""Forking worker processes: when that can be done, and what parent and child owe each other.

A forked process has all that was planned and loaded, without a copy. It is used where nothing of Python's would be cut
off in it, which is the usual state of a command line; a program with threads of its own gets threads.
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
from collections.abc import Iterator
from contextlib import contextmanager

from lora_cli.errors import LoraCliError
from lora_cli.signals import STOPPING

NOT_TO_BE_HAD = (OSError, ImportError, NotImplementedError)
"""What starting a process raises where there are no more of them, or no semaphores."""

_PARENT_DEATH = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


def can_fork() -> bool:
    """Whether a forked process can do our work: none of Python's threads, and no accelerator, would be cut off."""
    torch = sys.modules.get("torch")
    return (
        sys.platform == "linux"
        and threading.active_count() == 1
        and not multiprocessing.current_process().daemon
        and not (torch is not None and torch.cuda.is_initialized())
    )


@contextmanager
def forking() -> Iterator[None]:
    """Within it processes are forked. Signals wait until it is left, so that none unwinds the parent's work in a child.

    A process that was started before another failed to is ended when that error leaves the context.
    """
    others = set(multiprocessing.active_children())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        with warnings.catch_warnings():
            # Python warns of threads that libraries keep; none of them holds a lock that a worker takes.
            warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
            yield
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
            process.join()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def frozen() -> Iterator[None]:
    """Keep the search for garbage from touching what is shared with forked processes, which would copy it."""
    ours = gc.get_freeze_count() == 0
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def become_worker(parent: int) -> None:
    """Prepare a process that was just forked: it ends with its parent, and leaves what a terminal sends to it."""
    for number in STOPPING:
        # A pool that lost a worker ends the others by SIGTERM.
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before it could be bound to us
    gc.freeze()


def portable(error: BaseException) -> BaseException:
    """The error itself if it can go to another process, else one that says what it was."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (made here)
    except Exception:  # noqa: BLE001 (whatever it is that keeps it here)
        return LoraCliError("Internal error in a worker", found=f"{type(error).__name__}: {error}")
    return error
