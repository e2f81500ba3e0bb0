"""Files that are being written: preallocated, filled by position, synced once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_cli.checkpoint import advice, files
from lora_cli.checkpoint.files import Folder
from lora_cli.checkpoint.source import look_at
from lora_cli.errors import DiskFullError, LoraCliError, WriteError

if TYPE_CHECKING:
    from lora_cli.checkpoint.source import Reader

KERNEL_COPY = 64 << 20
COPY_CHUNK = 8 << 20
"""Bytes that one call moves, in the kernel and through memory, so that a stop is noticed in time."""

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_LONGEST_NAME = 150
"""Bytes of a target's name that a hidden name repeats; file systems allow 255 in all."""


class StagedFile:
    """One output file being made: preallocated, written by position by any worker, synced once.

    Args:
        folder: Where it is made.
        place: What it is called there.
        name: What errors call it.
        size: Its length in bytes.
    """

    def __init__(self, folder: Folder, place: str, name: str, size: int) -> None:
        self.path = folder.path / place
        self.name = name
        self.size = size
        self.descriptor = -1
        with write_errors(name):
            self.descriptor = folder.create(place)
            try:
                if size:
                    files.reserve(self.descriptor, size)
            except BaseException:
                self.abandon()
                raise

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data)
        with write_errors(self.name):
            done = 0
            while done < len(view):
                done += files.write_at(self.descriptor, view[done:], offset + done)

    def start_writing(self, offset: int, length: int) -> None:
        """Let the disk begin with bytes that were written; this may wait for the disk."""
        advice.start_writing(self.descriptor, offset, length)

    def copy(self, source: Reader, source_offset: int, offset: int, length: int) -> None:
        """Copy `length` bytes of an input unread where the kernel can, which also shares blocks where it may."""
        with write_errors(self.name):
            done = self._copy_in_kernel(source, source_offset, offset, length)
        while done < length:
            data = source.read(source_offset + done, min(COPY_CHUNK, length - done))
            self.write(offset + done, data)
            done += len(data)

    def _copy_in_kernel(self, source: Reader, source_offset: int, offset: int, length: int) -> int:
        done = 0
        while done < length:
            at, to, most = source_offset + done, offset + done, min(KERNEL_COPY, length - done)
            try:
                count = files.copy_range(source.descriptor, at, self.descriptor, to, most)
            except OSError as error:
                # What cannot be read is told by the read that follows, with the input's name and not the output's.
                if error.errno in files.NOT_POSSIBLE_HERE or error.errno == errno.EIO:
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
            found = files.status(self.descriptor).st_size
            if found != self.size:
                raise WriteError("The output has the wrong length", file=self.name, expected=self.size, found=found)
            files.sync(self.descriptor)
            if forget:
                advice.forget(self.descriptor)
            descriptor, self.descriptor = self.descriptor, -1
            files.close(descriptor)

    def abandon(self) -> None:
        """Close without a word."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                files.close(descriptor)


class Span(NamedTuple):
    """Where gathered bytes are: whose file, from where in it, and how many."""

    process: int
    at: int
    length: int


class Scratch:
    """Bytes that are gathered in any order beside an output, and are copied into it before it is published.

    Each process that adds some has a file of its own.

    Args:
        folder: Where these files are made.
        name: What they are called, but for the number of the process.
        label: What errors call them.
    """

    def __init__(self, folder: Folder, name: str, label: str) -> None:
        self._folder = folder
        self._name = name
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
                self._file = StagedFile(self._folder, self._place(self._process), self._label, 0)
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
        for name in self._folder.names():
            if name.startswith(f"{self._name}-"):
                self._folder.remove(name)

    def _place(self, process: int) -> str:
        return f"{self._name}-{process}"

    def _path(self, process: int) -> Path:
        return self._folder.path / self._place(process)


def write_beside(target: Path, data: bytes) -> None:
    """Write a small file whole, in place of what was there: for reports, which are made anew each time.

    Raises:
        DiskFullError: There is no space for it.
        WriteError: Anything else; what was there before is there still.
    """
    name = hidden_name(target.name, secrets.token_hex(6))
    with contextlib.ExitStack() as stack:
        try:
            with write_errors(str(target)):
                folder = Folder(target.parent)
                stack.callback(folder.close)
                stack.callback(folder.remove_tree, name)
            file = StagedFile(folder, name, str(target), len(data))
            stack.callback(file.abandon)
            file.write(0, data)
            file.finish()
            with write_errors(str(target)):
                folder.rename(name, folder, target.name)
                folder.sync()
        except DiskFullError as error:
            error.hint = "free some space, or choose another disk"  # it is no output, so not with -o
            raise


def hidden_name(name: str, what: str) -> str:
    """What something is called that is made beside a target, and goes again: recognisable, and short enough."""
    if len(os.fsencode(name)) > _LONGEST_NAME:
        digest = hashlib.blake2b(os.fsencode(name), digest_size=6).hexdigest()
        name = f"{name[: _LONGEST_NAME // 4]}-{digest}"
    return f".{name}.lora-cli-{what}"


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
