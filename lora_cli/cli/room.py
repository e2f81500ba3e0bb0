"""Whether libraries can be loaded where memory is limited: numpy and torch end the process where they get none."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

_LIBRARIES = ("numpy", "torch")
_PATIENCE = 30
"""Seconds of a processor for loading a library, which usually takes one or two."""


class _Trial:
    """Has a library loaded by another process before it is loaded here; who looks for modules asks it first."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if fullname in _LIBRARIES and not _loads_elsewhere(fullname, self):
            raise MemoryError


def try_libraries_first() -> None:
    """From now on, under a limit of this process' memory, load libraries elsewhere first.

    OpenBLAS leaves by `exit(1)` and torch aborts where they get too little, with staged files left behind. Then there
    is a MemoryError instead. It costs the time of one more import, only where `ulimit -v` or `ulimit -d` was set.
    """
    import resource

    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        sys.meta_path.insert(0, _Trial())


def _loads_elsewhere(name: str, trial: _Trial) -> bool:
    from lora_cli.surgery.forking import can_fork, forking

    if not can_fork():
        return True
    with forking():
        parent, child = os.getpid(), os.fork()
        if child == 0:
            _load(name, trial, parent)
    return os.waitpid(child, 0)[1] == 0


def _load(name: str, trial: _Trial, parent: int) -> None:
    """In the other process: nobody wants to hear what its libraries say at their end."""
    import resource

    from lora_cli.surgery.forking import become_worker

    try:
        become_worker(parent)
        # Where memory ends at a bad moment, Python can go round and round.
        resource.setrlimit(resource.RLIMIT_CPU, (_PATIENCE, _PATIENCE))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        sys.meta_path.remove(trial)
        importlib.import_module(name)
        os._exit(0)
    finally:
        os._exit(1)
