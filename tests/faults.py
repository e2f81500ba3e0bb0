"""A double of the system's file operations: it records each, and lets any of them fail, come short, or be the last.

`lora_cli.checkpoint.files` is the only module that makes these calls, so what is replaced there is all there is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from lora_cli.checkpoint import files

CALLS = (
    *("open", "close", "fstat", "stat", "statvfs", "listdir", "preadv", "pwrite", "copy_file_range", "posix_fallocate"),
    *("ftruncate", "fsync", "makedirs", "mkdir", "chmod", "fchmod", "rename", "link", "unlink", "rmdir"),
)
"""What is counted, besides `swap` and `flock`. Opening a file that is to be made is told as `create`."""
HARMLESS = ("fsencode", "strerror", "fspath", "getuid", "geteuid", "getpid")
"""Functions of `os` that touch no file."""
NEEDS_SPACE = {"create", "mkdir", "makedirs", "posix_fallocate", "ftruncate", "pwrite", "copy_file_range", "fsync"}
NEEDS_SPACE |= {"link", "rename", "swap"}
PUBLISHING = {"rename", "link", "swap"}
"""What gives something a name."""
SHORT = {"preadv", "pwrite", "copy_file_range"}


@dataclass(frozen=True)
class Operation:
    """One call to the system.

    Attributes:
        name: Which.
        path: Of what: a path, or that of a descriptor.
        to: The other path, of a rename, link, swap or copy.
    """

    name: str
    path: str
    to: str = ""


Act = Callable[[Operation], object]


def nothing(operation: Operation) -> None:
    """Let it be."""


def both(first: Act, second: Act) -> Act:
    """One after the other."""

    def act(operation: Operation) -> None:
        first(operation)
        second(operation)

    return act


class Double:
    """Stands for `os`, `swap_names` and `fcntl` in the module of file operations while it is `installed`.

    Args:
        before: Is told of each call before it is made; what it raises, the call raises.
        after: The same when it was made, and has changed what it changes, or has failed.
        short: Says whether a read, write or copy moves only a part.

    Attributes:
        log: All calls so far, in this process.
    """

    def __init__(
        self, before: Act = nothing, after: Act = nothing, short: Callable[[Operation], bool] = lambda _: False
    ) -> None:
        self.log: list[Operation] = []
        self._before, self._after, self._short = before, after, short
        self._paths: dict[int, str] = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator[Double]:
        """Let all file operations pass here."""
        swap, flock = self._wrapped("swap", files.swap_names), self._wrapped("flock", fcntl.flock)
        locking = mock.Mock(wraps=fcntl, flock=flock, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB)
        with (
            mock.patch.object(files, "os", _System(self)),
            mock.patch.object(files, "swap_names", swap),
            mock.patch.object(files, "fcntl", locking),
        ):
            yield self

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            operation = self._operation(name, arguments, named)
            self.log.append(operation)
            if name == "close":  # it is closed, whatever close says
                self._paths.pop(arguments[0], None)
                real(*arguments)
            self._before(operation)
            if operation.name in SHORT and self._short(operation):
                arguments = _part(name, arguments)
            try:
                # The disk itself is not what is tried here.
                result = None if name in ("fsync", "close") else real(*arguments, **named)
                if name == "open":
                    assert isinstance(result, int)
                    self._paths[result] = operation.path
            finally:
                self._after(operation)
            return result

        return call

    def _operation(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Operation:
        if name == "swap":
            folder, old, other, new = arguments
            return Operation(name, self._path(old, folder), self._path(new, other))
        if name in ("rename", "link"):
            old, new = arguments
            return Operation(name, self._path(old, named["src_dir_fd"]), self._path(new, named["dst_dir_fd"]))
        if name == "copy_file_range":
            return Operation(name, self._path(arguments[1]), self._path(arguments[0]))
        if name == "open" and arguments[1] & os.O_CREAT:
            name = "create"
        return Operation(name, self._path(arguments[0], named.get("dir_fd")))

    def _path(self, what: object, folder: int | None = None) -> str:
        if isinstance(what, int):
            return self._paths.get(what, f"descriptor {what}")
        return os.fspath(what) if folder is None else f"{self._paths[folder]}/{what}"  # type: ignore[call-overload]


class _System:
    """What the module of file operations takes for `os`."""

    def __init__(self, double: Double) -> None:
        for name in CALLS:
            if hasattr(os, name):
                setattr(self, name, double._wrapped(name, getattr(os, name)))

    def __getattr__(self, name: str) -> Any:
        found = getattr(os, name)
        assert name in HARMLESS or not callable(found) or isinstance(found, type), f"os.{name} is not counted"
        return found


def _part(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments for about half of what was asked for."""
    if name == "copy_file_range":
        return (*arguments[:2], arguments[2] // 2 + 1, *arguments[3:])
    descriptor, data, offset = arguments
    view = data[0] if name == "preadv" else data
    view = view[: len(view) // 2 + 1]
    return descriptor, [view] if name == "preadv" else view, offset


def can_meet(operation: Operation, number: int) -> bool:
    """Whether a call can fail with this error: that there is no space, only one that needs some."""
    return number not in (errno.ENOSPC, errno.EDQUOT) or operation.name in NEEDS_SPACE


class Failing:
    """Lets the call of a number fail; for `Double(before=…)`.

    Args:
        number: The error.
        at: Which of the calls that can meet it, counted from one.
        good: Whether all calls after it fail too.

    Attributes:
        met: The call that failed first.
        calls: How many calls could have met it so far.
    """

    def __init__(self, number: int, at: int, *, good: bool = False) -> None:
        self.met: Operation | None = None
        self.calls = 0
        self._number, self._at, self._good = number, at, good

    def __call__(self, operation: Operation) -> None:
        if not can_meet(operation, self._number):
            return
        self.calls += 1
        if self.calls == self._at or (self._good and self.calls > self._at):
            self.met = self.met or operation
            raise OSError(self._number, os.strerror(self._number))


class At:
    """Does something at the call of a number; for `Double(before=…)`, `after` or `short`."""

    def __init__(self, at: int, do: Callable[[], object] = lambda: None) -> None:
        self.calls = 0
        self._at, self._do = at, do

    def __call__(self, operation: Operation) -> bool:
        self.calls += 1
        if self.calls == self._at:
            self._do()
        return self.calls == self._at
