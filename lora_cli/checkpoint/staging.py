"""Writing outputs: complete and synced, or absent.

Everything is written into a folder of a recognisable name beside the target, synced, and renamed into place. Nothing
else in the project creates, renames or removes files.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.checkpoint.source import look_at
from lora_cli.errors import DiskFullError, LoraCliError, OutputExistsError, UsageError, WriteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from lora_cli.checkpoint.source import Reader

KERNEL_COPY = 256 << 20
COPY_CHUNK = 8 << 20
"""Bytes that one call moves, in the kernel and through memory, so that a stop is noticed in time."""

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NOT_POSSIBLE_HERE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EBADF, errno.EPERM}


class StagedFile:
    """One output file: preallocated, written by position from any thread, synced once."""

    def __init__(self, path: Path, name: str, size: int) -> None:
        self.path = path
        self.name = name
        self.size = size
        with _write_errors(name):
            path.parent.mkdir(parents=True, exist_ok=True)
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
                if error.errno not in _NOT_POSSIBLE_HERE:
                    raise
            else:
                return
        os.ftruncate(self.descriptor, self.size)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data)
        with _write_errors(self.name):
            done = 0
            while done < len(view):
                done += os.pwrite(self.descriptor, view[done:], offset + done)

    def copy(self, source: Reader, source_offset: int, offset: int, length: int) -> None:
        """Copy `length` bytes of an input unread where the kernel can, which also shares blocks where it may."""
        done = 0
        if hasattr(os, "copy_file_range"):
            with _write_errors(self.name):
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
                if error.errno in _NOT_POSSIBLE_HERE:
                    return done
                raise
            if count == 0:
                return done
            done += count
        return done

    def finish(self) -> None:
        """Check the length, sync and close. A failed sync is never tried again: its pages may be lost."""
        with _write_errors(self.name):
            found = os.fstat(self.descriptor).st_size
            if found != self.size:
                raise WriteError("The output has the wrong length", file=self.name, expected=self.size, found=found)
            os.fsync(self.descriptor)
            os.close(self.descriptor)
            self.descriptor = -1

    def abandon(self) -> None:
        """Close without a word."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Scratch:
    """Bytes that are gathered in any order beside an output, and are copied into it before it is published."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: StagedFile | None = None
        self._end = 0
        self._lock = threading.Lock()

    def append(self, data: bytes) -> tuple[int, int]:
        """Add bytes, from any thread; returns where they are, and how many."""
        with self._lock:
            if self._file is None:
                self._file = StagedFile(self._path, self._path.name, 0)
            at = self._end
            self._end += len(data)
        self._file.write(at, data)
        return at, len(data)

    def copy_to(self, file: StagedFile, offset: int, spans: Iterable[tuple[int, int]]) -> None:
        """Copy spans, one after another, to an offset of an output file."""
        with look_at(self._path).open() as reader:
            for at, length in spans:
                file.copy(reader, at, offset, length)
                offset += length

    def abandon(self) -> None:
        """Close it, and take it away."""
        if self._file is not None:
            self._file.abandon()
            self._path.unlink(missing_ok=True)
            self._file = None


class Staging:
    """An output being made beside its target: what is not published by the end of `opened` leaves no trace.

    Args:
        target: The folder to make, or the `.safetensors` file.
        folder: Whether the target is a folder.
        may_replace: Decides, when something is there already, whether lora-cli itself wrote it (`--force`).
    """

    def __init__(self, target: Path, *, folder: bool, may_replace: Callable[[], bool] = lambda: False) -> None:
        self.target = target
        self.folder = folder
        self._may_replace = may_replace
        self._files: list[StagedFile] = []
        self._scratches: list[Scratch] = []
        check_target(target, folder=folder, may_replace=may_replace)
        self.place = target.parent / f".{target.name}.lora-cli-{secrets.token_hex(6)}"

    @contextlib.contextmanager
    def opened(self) -> Iterator[Staging]:
        """The staging folder for as long as the context lasts; whatever ends it, even a signal, the folder goes."""
        try:
            with _write_errors(self.target.name):
                self.place.mkdir(mode=0o777)
            yield self
        finally:
            for file in self._files:
                file.abandon()
            for scratch in self._scratches:
                scratch.abandon()
            shutil.rmtree(self.place, ignore_errors=True)

    @property
    def names(self) -> list[str]:
        """Names of the files created so far."""
        return [file.name for file in self._files]

    @property
    def bytes_written(self) -> int:
        """Bytes of the files created so far."""
        return sum(file.size for file in self._files)

    def scratch(self) -> Scratch:
        """A place for bytes of the work, which are no part of the output; to be removed before publishing."""
        scratch = Scratch(self.place / ".scratch")
        self._scratches.append(scratch)
        return scratch

    def create(self, name: str, size: int) -> StagedFile:
        """Create one output file of `size` bytes; `name` may hold a sub-folder."""
        file = StagedFile(self.place / name, name, size)
        self._files.append(file)
        return file

    def write_small(self, name: str, data: bytes) -> None:
        """Write and sync a small file whole."""
        file = self.create(name, len(data))
        file.write(0, data)
        file.finish()

    def publish(self, done: Callable[[], None] = lambda: None, outdated: Iterable[str] = ()) -> None:
        """Put everything in its place: for a folder by one rename, for files in the order they were created.

        Args:
            done: Is called as soon as the output is complete in its place.
            outdated: Names of small files beside a file that was replaced, which tell of what it was before.

        Raises:
            OutputExistsError: Somebody made the target in the meantime.
            WriteError: The rename failed; the target is as it was before.
        """
        for scratch in self._scratches:
            scratch.abandon()
        with _write_errors(self.target.name):
            replacing = self.target.exists() and not self.folder
            if self.folder:
                self._publish_folder()
            else:
                self._publish_files()
            done()
            for name in outdated if replacing else ():
                (self.target.parent / name).unlink(missing_ok=True)
            _sync_folder(self.target.parent)

    def _publish_folder(self) -> None:
        for path in {self.place, *(file.path.parent for file in self._files)}:
            _sync_folder(path)
        aside = self.place.with_name(self.place.name + "-old")
        try:
            if self.target.is_dir() and any(self.target.iterdir()):
                check_target(self.target, folder=True, may_replace=self._may_replace)
                self.target.rename(aside)
            self.place.rename(self.target)
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
                raise OutputExistsError("The output was made by somebody else meanwhile", file=self.target) from error
            raise
        finally:
            # Also when a signal came between the two: what was there before goes back, or goes for good.
            if aside.exists() and not self.target.exists():
                aside.rename(self.target)
            shutil.rmtree(aside, ignore_errors=True)

    def _publish_files(self) -> None:
        """Put each file in its place; if one of them cannot be, take back those before it."""
        replace = self._may_replace()
        published: list[Path] = []
        try:
            for file in self._files:
                target = self.target.parent / file.name
                self._publish_file(file.path, target, replace=replace)
                published.append(target)
        except BaseException:
            if not replace:
                for target in published:
                    target.unlink(missing_ok=True)
            raise

    def _publish_file(self, staged: Path, target: Path, *, replace: bool) -> None:
        if replace:
            staged.replace(target)
            return
        # A hard link refuses to overwrite; a rename would not.
        try:
            os.link(staged, target)
        except FileExistsError as error:
            raise OutputExistsError("The output was made by somebody else meanwhile", file=target) from error
        except OSError as error:
            if error.errno not in _NOT_POSSIBLE_HERE:
                raise
            staged.rename(target)


def check_target(target: Path, *, folder: bool, may_replace: Callable[[], bool]) -> None:
    """Refuse a target that cannot be written, or that holds anything that lora-cli did not write.

    Raises:
        UsageError: Its folder does not exist.
        OutputExistsError: Something is there.
    """
    if not target.parent.is_dir():
        raise UsageError("The folder of the output does not exist", file=target.parent, hint="make it first")
    if target.is_symlink():
        raise OutputExistsError("The output is a symbolic link", file=target, hint="name the place it points to")
    if not target.exists() or (folder and target.is_dir() and not any(target.iterdir())):
        return
    if folder != target.is_dir():
        kind = "file" if folder else "folder"
        raise OutputExistsError(f"A {kind} stands where the output should go", file=target)
    if not may_replace():
        raise OutputExistsError(
            "The output exists already",
            file=target,
            hint="choose another name with -o; --force replaces only what lora-cli wrote",
        )


def check_apart(target: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is an input, lies inside one, or would swallow one.

    Raises:
        OutputExistsError: Output and input are the same place, by device and inode or by path.
    """
    place = target.resolve()
    for path in inputs:
        real = path.resolve()
        same = target.exists() and path.exists() and target.samefile(path)
        if same or place == real or real in place.parents or place in real.parents:
            raise OutputExistsError(
                "The output would be written into an input",
                file=target,
                found=f"input {path}",
                hint="choose a place outside the inputs with -o",
            )


def check_space(target: Path, needed: int) -> None:
    """Refuse when the file system of `target` has less than `needed` bytes free.

    Raises:
        DiskFullError: With what is needed and what is free.
    """
    free = free_bytes(target)
    if free < needed:
        raise DiskFullError(
            "Not enough free space for the output",
            file=target.parent,
            expected=f"{needed} bytes",
            found=f"{free} bytes free",
            hint="free some space or choose another disk with -o",
        )


def free_bytes(target: Path) -> int:
    """Bytes free for this user where `target` will be."""
    return shutil.disk_usage(target.parent if target.parent.exists() else Path.cwd()).free


@contextlib.contextmanager
def _write_errors(name: str) -> Iterator[None]:
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


def _sync_folder(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # some file systems let nobody open a folder
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_POSSIBLE_HERE:
            raise
    finally:
        os.close(descriptor)


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
        with _write_errors(str(target)):
            place.replace(target)
            _sync_folder(target.parent)
    except DiskFullError as error:
        error.hint = "free some space, or choose another disk"  # it is no output, so not with -o
        raise
    finally:
        if file is not None:
            file.abandon()
        place.unlink(missing_ok=True)
