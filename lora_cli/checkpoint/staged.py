"""Files that are being written: preallocated, filled by position, synced once."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_cli.checkpoint import advice
from lora_cli.checkpoint.source import look_at
from lora_cli.errors import DiskFullError, LoraCliError, WriteError

if TYPE_CHECKING:
    from lora_cli.checkpoint.source import Reader

KERNEL_COPY = 64 << 20
COPY_CHUNK = 8 << 20
"""Bytes that one call moves, in the kernel and through memory, so that a stop is noticed in time."""

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
NOT_POSSIBLE_HERE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EBADF, errno.EPERM}


class StagedFile:
    """One output file in a folder that is there: preallocated, written by position by any worker, synced once."""

    def __init__(self, path: Path, name: str, size: int) -> None:
        self.path = path
        self.name = name
        self.size = size
        with write_errors(name):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self.descriptor = os.open(path, flags, 0o666)
            try:
                self._preallocate()
            except BaseException:
                self.abandon()
                raise

    def _preallocate(self) -> None:
        if self.size == 0:
            return
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self.descriptor, 0, self.size)
            except OSError as error:
                if error.errno not in NOT_POSSIBLE_HERE:
                    raise
            else:
                return
        os.ftruncate(self.descriptor, self.size)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data)
        with write_errors(self.name):
            done = 0
            while done < len(view):
                done += os.pwrite(self.descriptor, view[done:], offset + done)

    def start_writing(self, offset: int, length: int) -> None:
        """Let the disk begin with bytes that were written; this may wait for the disk."""
        advice.start_writing(self.descriptor, offset, length)

    def copy(self, source: Reader, source_offset: int, offset: int, length: int) -> None:
        """Copy `length` bytes of an input unread where the kernel can, which also shares blocks where it may."""
        done = 0
        if hasattr(os, "copy_file_range"):
            with write_errors(self.name):
                done = self._copy_in_kernel(source, source_offset, offset, length)
        while done < length:
            data = source.read(source_offset + done, min(COPY_CHUNK, length - done))
            self.write(offset + done, data)
            done += len(data)

    def _copy_in_kernel(self, source: Reader, source_offset: int, offset: int, length: int) -> int:
        done = 0
        while done < length:
            try:
                count = os.copy_file_range(
                    source.descriptor,
                    self.descriptor,
                    min(KERNEL_COPY, length - done),
                    source_offset + done,
                    offset + done,
                )
            except OSError as error:
                if error.errno in NOT_POSSIBLE_HERE:
                    return done
                raise
            if count == 0:
                return done
            done += count
        return done

    def finish(self, *, forget: bool = False) -> None:
        """Check the length, sync and close. A failed sync is never tried again: its pages may be lost.

        Args:
            forget: Leave nothing of it in the page cache.
        """
        with write_errors(self.name):
            found = os.fstat(self.descriptor).st_size
            if found != self.size:
                raise WriteError("The output has the wrong length", file=self.name, expected=self.size, found=found)
            os.fsync(self.descriptor)
            if forget:
                advice.forget(self.descriptor)
            os.close(self.descriptor)
            self.descriptor = -1

    def abandon(self) -> None:
        """Close without a word."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Span(NamedTuple):
    """Where gathered bytes are: whose file, from where in it, and how many."""

    process: int
    at: int
    length: int


class Scratch:
    """Bytes that are gathered in any order beside an output, and are copied into it before it is published.

    Each process that adds some has a file of its own.

    Args:
        place: What these files are called, but for the number of the process.
        label: What errors call them.
    """

    def __init__(self, place: Path, label: str) -> None:
        self._place = place
        self._label = label
        self._file: StagedFile | None = None
        self._process = 0
        self._end = 0
        self._lock = threading.Lock()

    def append(self, data: bytes) -> Span:
        """Add bytes, from any thread or process; returns where they are."""
        with self._lock:
            if self._process != os.getpid():
                self._process, self._end = os.getpid(), 0
                self._file = StagedFile(self._path(self._process), self._label, 0)
            at = self._end
            self._end += len(data)
        assert self._file is not None  # noqa: S101 (made above)
        self._file.write(at, data)
        return Span(self._process, at, len(data))

    def copy_to(self, file: StagedFile, offset: int, spans: Iterable[Span]) -> None:
        """Copy spans, one after another, to an offset of an output file."""
        with contextlib.ExitStack() as stack:
            readers: dict[int, Reader] = {}
            for process, at, length in spans:
                if process not in readers:
                    readers[process] = stack.enter_context(look_at(self._path(process)).open())
                file.copy(readers[process], at, offset, length)
                offset += length

    def read(self, span: Span) -> bytes:
        """Return the bytes of a span that any process has added."""
        with look_at(self._path(span.process)).open() as reader:
            return reader.read(span.at, span.length)

    def abandon(self) -> None:
        """Close and take away the files of all processes, which must have ended."""
        if self._file is not None:
            self._file.abandon()
            self._file = None
        for path in self._place.parent.glob(f"{self._place.name}-*"):
            path.unlink(missing_ok=True)

    def _path(self, process: int) -> Path:
        return self._place.with_name(f"{self._place.name}-{process}")


def write_beside(target: Path, data: bytes) -> None:
    """Write a small file whole, in place of what was there: for reports, which are made anew each time.

    Raises:
        DiskFullError: There is no space for it.
        WriteError: Anything else; what was there before is there still.
    """
    place = target.with_name(f".{target.name}.lora-cli-{secrets.token_hex(6)}")
    file: StagedFile | None = None
    try:
        file = StagedFile(place, str(target), len(data))
        file.write(0, data)
        file.finish()
        with write_errors(str(target)):
            place.replace(target)
            sync_folder(target.parent)
    except DiskFullError as error:
        error.hint = "free some space, or choose another disk"  # it is no output, so not with -o
        raise
    finally:
        if file is not None:
            file.abandon()
        place.unlink(missing_ok=True)


@contextlib.contextmanager
def write_errors(name: str) -> Iterator[None]:
    """Turn the system's errors into ours, with the file's name."""
    try:
        yield
    except LoraCliError:
        raise
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise DiskFullError(
                "The disk is full", file=name, hint="free some space or choose another disk with -o"
            ) from error
        raise WriteError(f"The output cannot be written: {error.strerror}", file=name) from error


def sync_folder(path: Path) -> None:
    """Sync a folder's entries, where the file system lets us."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # some file systems let nobody open a folder
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_POSSIBLE_HERE:
            raise
    finally:
        os.close(descriptor)
