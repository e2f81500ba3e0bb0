"""Reading input files: regular files only, by position, into buffers the caller owns.

No memory maps: a mapped file that shrinks kills the process, and page faults cost more than the copies they save.
A file that changes while it is read is an error, never a mixture.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_cli.checkpoint import files
from lora_cli.errors import ChangedFileError, MalformedFileError, UnsafeInputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator


_SOCKET = {errno.ENXIO, errno.EOPNOTSUPP}
"""What opening a socket gives on Linux and macOS."""


class Identity(NamedTuple):
    """What must stay the same between the first and the last read of a file."""

    device: int
    inode: int
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A regular file as it was when it was first looked at.

    Attributes:
        path: Where it is on this machine.
        name: What messages and receipts call it.
        identity: Device, inode, size and time of the last change.
    """

    path: Path
    name: str
    identity: Identity

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.identity.size

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for positioned reads; on leaving without an error, check that the file is still the same.

        Raises:
            ChangedFileError: The file changed since it was first looked at.
        """
        reader = Reader(self)
        try:
            reader.check_unchanged()
            yield reader
            reader.check_unchanged()
        finally:
            reader.close()


class Reader:
    """Positioned reads from one open file; safe to share between threads while nobody lets it rest."""

    def __init__(self, source: SourceFile) -> None:
        self.source = source
        self._descriptor = -1
        self._open()

    @property
    def descriptor(self) -> int:
        """The open file; it is opened again after a rest."""
        if self._descriptor < 0:
            self._open()
            self.check_unchanged()
        return self._descriptor

    def _open(self) -> None:
        try:
            self._descriptor = _open_regular(self.source.path, self.source.name)
        except UsageError as error:
            raise ChangedFileError("The file went away while it was needed", file=self.source.name) from error

    def rest(self) -> None:
        """Close until the next read: a process may have few files open."""
        self.check_unchanged()
        self.close()

    def close(self) -> None:
        """Give the descriptor back."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            files.close_read(descriptor)

    def check_unchanged(self) -> None:
        """Raise ChangedFileError if the file is not the one that was planned with."""
        if _identity(_status(self.descriptor, self.source.name)) != self.source.identity:
            raise ChangedFileError("The file changed while it was read", file=self.source.name)

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`."""
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`.

        Raises:
            ChangedFileError: The file ends before that.
            MalformedFileError: The device cannot read it.
        """
        done = 0
        while done < len(buffer):
            try:
                count = files.read_at(self.descriptor, buffer[done:], offset + done)
            except OSError as error:
                raise MalformedFileError(
                    f"The file cannot be read at byte {offset + done}: {error.strerror}",
                    file=self.source.name,
                ) from error
            if count == 0:
                raise ChangedFileError(
                    "The file ended while it was read",
                    file=self.source.name,
                    expected=f"{offset + len(buffer)} bytes",
                    found=f"{offset + done} bytes",
                )
            done += count


def as_text(name: str) -> str:
    """Return the name of a file as text that every file can hold: bytes that are no UTF-8 are written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def check_path(path: Path) -> None:
    """Refuse a path that no file can have here.

    Raises:
        UsageError: It is too long, or holds the character NUL.
    """
    try:
        path.lstat()
    except ValueError as error:
        raise UsageError("The path holds the character NUL", file=path) from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError("The path is too long", file=path, hint="choose a shorter one") from error


def look_at(path: Path, name: str | None = None) -> SourceFile:
    """Look at a regular file without keeping it open.

    Raises:
        UsageError: It does not exist.
        UnsafeInputError: It is a device, pipe or socket.
        MalformedFileError: It is a folder, or may not be read.
    """
    name = name or path.name
    descriptor = _open_regular(path, name)
    try:
        return SourceFile(path, name, _identity(_status(descriptor, name)))
    finally:
        files.close_read(descriptor)


class Looks:
    """First looks at small files: whoever reads one reads what it was then, or is told that it has changed."""

    def __init__(self) -> None:
        self._seen: dict[Path, SourceFile] = {}

    def __contains__(self, path: Path) -> bool:
        return path in self._seen

    def check_there(self, paths: Collection[Path]) -> None:
        """Raise ChangedFileError if one of them is not among these paths any more."""
        for path, source in self._seen.items():
            if path not in paths:
                with source.open():
                    pass

    def at(self, path: Path, name: str | None = None) -> SourceFile:
        """Look at a file, or return what was seen of it before; see `look_at`."""
        if path not in self._seen:
            self._seen[path] = look_at(path, name)
        return self._seen[path]


def read_whole(place: Path | SourceFile, *, limit: int, name: str | None = None) -> bytes:
    """Return the bytes of a small file.

    Raises:
        MalformedFileError: It is longer than `limit` bytes, or changed since it was looked at.
    """
    source = place if isinstance(place, SourceFile) else look_at(place, name)
    check_size(source, limit)
    with source.open() as reader:
        return reader.read(0, source.size)


def check_size(source: SourceFile, limit: int) -> None:
    """Refuse a small file that is not small.

    Raises:
        MalformedFileError: It is longer than `limit` bytes.
    """
    if source.size > limit:
        raise MalformedFileError(
            "The file is too large to be what its name says",
            file=source.name,
            expected=f"at most {limit} bytes",
            found=f"{source.size} bytes",
        )


def listing(folder: Path, *, below: bool = False) -> list[Path]:
    """What is in a folder, in the order of names, or all that is in it and in its folders.

    Raises:
        MalformedFileError: It cannot be listed.
    """
    try:
        return files.listed_below(folder) if below else files.listed(folder)
    except OSError as error:
        raise MalformedFileError(
            f"The folder cannot be listed: {error.strerror}",
            file=error.filename or folder,
            hint="check who may read it",
        ) from error


def _identity(status: os.stat_result) -> Identity:
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _status(descriptor: int, name: str) -> os.stat_result:
    try:
        return files.status(descriptor)
    except OSError as error:
        raise MalformedFileError(f"The file cannot be read: {error.strerror}", file=name) from error


def _open_regular(path: Path, name: str) -> int:
    # O_NONBLOCK: opening a pipe must not wait for somebody to write into it.
    try:
        descriptor = files.open_to_read(path)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: NUL in its name
        raise UsageError("The file does not exist", file=name) from error
    except OSError as error:
        if error.errno in _SOCKET:
            raise UnsafeInputError("Not a regular file", file=name) from error
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError("The path is too long", file=name) from error
        raise MalformedFileError(
            f"The file cannot be opened: {error.strerror}", file=name, hint="check who may read it"
        ) from error
    try:
        mode = _status(descriptor, name).st_mode
    except BaseException:
        files.close_read(descriptor)
        raise
    if stat.S_ISREG(mode):
        return descriptor
    files.close_read(descriptor)
    if stat.S_ISDIR(mode):
        raise MalformedFileError("A folder stands where a file is expected", file=name)
    raise UnsafeInputError("Not a regular file", file=name, hint="copy its content to a regular file first")
