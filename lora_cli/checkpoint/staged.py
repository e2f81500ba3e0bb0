"""Files that are being written: preallocated, filled by position, synced once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from lora_cli.checkpoint import advice, files
from lora_cli.checkpoint.files import Folder
from lora_cli.checkpoint.source import Reader, look_at
from lora_cli.errors import DiskFullError, LoraCliError, MalformedFileError, UsageError, WriteError

KERNEL_COPY = 64 << 20
COPY_CHUNK = 8 << 20
"""Bytes that one call moves, in the kernel and through memory, so that a stop is noticed in time."""

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
ASIDE = "-old"
"""What is added to the name of what is replaced, where two names cannot be exchanged in one step."""
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
        self._folder = folder
        self._rests = False
        with write_errors(name):
            self.descriptor = folder.create(place)
            try:
                if size:
                    files.reserve(self.descriptor, size)
            except BaseException:
                self.abandon()
                raise

    @classmethod
    def taken_over(cls, folder: Folder, place: str, name: str, size: int) -> StagedFile:
        """A file that another run finished: nothing is to be written to it any more."""
        file = cls.__new__(cls)
        file.path, file.name, file.size, file.descriptor = folder.path / place, name, size, -1
        file._folder, file._rests = folder, False
        return file

    def rest(self) -> None:
        """Close for now; whatever is done with it opens it for as long as that takes.

        A process may have few files open, and an output may have thousands.
        """
        with write_errors(self.name):
            descriptor, self.descriptor, self._rests = self.descriptor, -1, True
            files.close(descriptor)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        if not self._rests:
            yield self.descriptor
            return
        descriptor = self._folder.open_again(self.path.name)
        try:
            yield descriptor
        finally:
            files.close(descriptor)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data)
        with write_errors(self.name), self._opened() as descriptor:
            done = 0
            while done < len(view):
                done += files.write_at(descriptor, view[done:], offset + done)

    def start_writing(self, offset: int, length: int) -> None:
        """Let the disk begin with bytes that were written; this may wait for the disk."""
        with write_errors(self.name), self._opened() as descriptor:
            advice.start_writing(descriptor, offset, length)

    def copy(self, source: Reader, source_offset: int, offset: int, length: int) -> None:
        """Copy `length` bytes of an input unread where the kernel can, which also shares blocks where it may."""
        with write_errors(self.name), self._opened() as descriptor:
            done = self._copy_in_kernel(source, source_offset, descriptor, offset, length)
        while done < length:
            data = source.read(source_offset + done, min(COPY_CHUNK, length - done))
            self.write(offset + done, data)
            done += len(data)

    def _copy_in_kernel(self, source: Reader, source_offset: int, descriptor: int, offset: int, length: int) -> int:
        done = 0
        while done < length:
            at, to, most = source_offset + done, offset + done, min(KERNEL_COPY, length - done)
            try:
                count = files.copy_range(source.descriptor, at, descriptor, to, most)
            except OSError as error:
                # What cannot be read is told by the read that follows, with the input's name and not the output's.
                if error.errno in files.NOT_POSSIBLE_HERE or error.errno == errno.EIO:
                    return done
                raise
            if count == 0:
                return done
            done += count
        return done

    def sync(self) -> None:
        """Wait until what was written is on the disk, and go on writing."""
        with write_errors(self.name), self._opened() as descriptor:
            files.sync(descriptor)

    def finish(self, *, forget: bool = False) -> None:
        """Check the length, sync and close. A failed sync is never tried again: its pages may be lost.

        Args:
            forget: Leave nothing of it in the page cache.
        """
        with write_errors(self.name):
            with self._opened() as descriptor:
                found = files.status(descriptor).st_size
                if found != self.size:
                    raise WriteError("The output has the wrong length", file=self.name, expected=self.size, found=found)
                files.sync(descriptor)
                if forget:
                    advice.forget(descriptor)
            if not self._rests:
                descriptor, self.descriptor = self.descriptor, -1
                files.close(descriptor)

    def abandon(self) -> None:
        """Close without a word."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                files.close(descriptor)


class Span(NamedTuple):
    """Where gathered bytes are: in which file, from where in it, and how many."""

    file: str
    at: int
    length: int


class Scratch:
    """Bytes that are gathered in any order beside an output, and are copied into it before it is published.

    Each process of each run that adds some has a file of its own.

    Args:
        folder: Where these files are made.
        name: What their names begin with.
        label: What errors call them.
    """

    def __init__(self, folder: Folder, name: str, label: str) -> None:
        self._folder = folder
        self._name = f"{name}-{secrets.token_hex(4)}"
        self._all = name
        self._label = label
        self._file: StagedFile | None = None
        self._process = 0
        self._end = 0
        self._lock = threading.Lock()

    def append(self, data: bytes) -> Span:
        """Add bytes, from any thread or process; returns where they are."""
        with self._lock:
            if self._process != os.getpid():
                self._file = StagedFile(self._folder, f"{self._name}-{os.getpid()}", self._label, 0)
                self._process, self._end = os.getpid(), 0
            at = self._end
            self._end += len(data)
        assert self._file is not None  # noqa: S101 (made above)
        self._file.write(at, data)
        return Span(self._file.path.name, at, len(data))

    def copy_to(self, file: StagedFile, offset: int, spans: Iterable[Span]) -> None:
        """Copy spans, one after another, to an offset of an output file."""
        with self._read_again(), self._readers() as reader_of:
            for span in spans:
                file.copy(reader_of(span), span.at, offset, span.length)
                offset += span.length

    def read(self, span: Span) -> bytes:
        """Return the bytes of a span that any process has added."""
        with self._read_again(), self._readers() as reader_of:
            return reader_of(span).read(span.at, span.length)

    @contextlib.contextmanager
    def _read_again(self) -> Iterator[None]:
        """Within it these files are read, which are no input: whatever is wrong is wrong with the output's disk."""
        try:
            yield
        except (MalformedFileError, UsageError, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else error.message
            raise WriteError(
                "What was written beside the output cannot be read again", file=self._label, found=why
            ) from error

    def seal(self, spans: Iterable[Span]) -> str:
        """Wait until spans are on the disk, and return the digest of their bytes.

        Raises:
            WriteError: They are not there.
        """
        digest, synced = blake3(), set()
        with self._read_again(), self._readers() as reader_of:
            for span in spans:
                reader = reader_of(span)
                if span.file not in synced:
                    synced.add(span.file)
                    with write_errors(self._label):
                        files.sync(reader.descriptor)
                digest.update(reader.read(span.at, span.length))
        return digest.hexdigest()

    def close(self) -> None:
        """Close; what was added stays."""
        if self._file is not None:
            self._file.abandon()
            self._file = None

    @contextlib.contextmanager
    def _readers(self) -> Iterator[Callable[[Span], Reader]]:
        """Gives the file of a span, opened once. It may grow meanwhile: other processes go on adding."""
        with contextlib.ExitStack() as stack:
            readers: dict[str, Reader] = {}

            def reader_of(span: Span) -> Reader:
                if span.file not in readers:
                    if not span.file.startswith(f"{self._all}-") or "/" in span.file:
                        raise MalformedFileError("Not a file of gathered bytes", file=span.file)
                    readers[span.file] = Reader(look_at(self._folder.path / span.file))
                    stack.callback(readers[span.file].close)
                there = files.status(readers[span.file].descriptor).st_size
                if span.at < 0 or not 0 <= span.length <= there - span.at:
                    raise MalformedFileError("Gathered bytes are not all there", file=span.file)
                return readers[span.file]

            yield reader_of


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
