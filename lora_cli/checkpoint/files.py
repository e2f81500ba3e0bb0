"""The one place where files are opened, listed, read, written, synced, renamed and removed.

Each function is one call to the system and raises its OSError; what a person is told of it is said by those who call.
Nothing else in lora-cli does any of this, so that a test can let every single call fail. Questions about a path (is
it there, is it a folder) are pathlib's, and advice to the page cache is in `advice`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

NOT_POSSIBLE_HERE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EBADF, errno.EPERM}
"""What calls that not every file system has give where it has not."""

_SWAP = 2
"""RENAME_EXCHANGE of renameat2(2), and RENAME_SWAP of renameatx_np(2) on macOS."""


def open_to_read(path: Path) -> int:
    """Open what is at a path; a pipe is not waited for."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def status(descriptor: int) -> os.stat_result:
    """What the system knows of an open file."""
    return os.fstat(descriptor)


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read into a buffer from an offset; returns how many bytes there were, which may be fewer than it holds."""
    return os.preadv(descriptor, [buffer], offset)


def close(descriptor: int) -> None:
    """Give a descriptor back."""
    os.close(descriptor)


def close_read(descriptor: int) -> None:
    """Give a descriptor back that nothing was written to: no error of that tells of anything."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


def listed(folder: Path) -> list[Path]:
    """What is in a folder, by name."""
    return [folder / name for name in sorted(os.listdir(folder))]


def listed_below(folder: Path) -> list[Path]:
    """Everything in a folder and in its folders, at any depth; links are not followed."""
    found = []
    for path in listed(folder):
        found.append(path)
        if path.is_dir() and not path.is_symlink():
            found += listed_below(path)
    return found


@cache
def open_at_once() -> int:
    """How many files of one kind may stay open: a small part of what this process may have open."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1024 if most == resource.RLIM_INFINITY else most // 8


def make_folders(path: Path) -> None:
    """Make a folder, and those around it, where they are missing."""
    os.makedirs(path, exist_ok=True)


def write_at(descriptor: int, data: memoryview, offset: int) -> int:
    """Write at an offset; returns how many bytes were taken, which may be fewer than there are."""
    return os.pwrite(descriptor, data, offset)


def copy_range(source: int, at: int, target: int, offset: int, count: int) -> int:
    """Copy inside the kernel; returns how many bytes were. EOPNOTSUPP where the system cannot."""
    if not hasattr(os, "copy_file_range"):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    return os.copy_file_range(source, target, count, at, offset)


def reserve(descriptor: int, size: int) -> None:
    """Let a new file have its length, and its blocks where the file system can give them at once."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in NOT_POSSIBLE_HERE:
                raise
        else:
            return
    os.ftruncate(descriptor, size)


def sync(descriptor: int) -> None:
    """Wait until a file is on the disk. Never to be tried again: after an error its pages may be lost."""
    os.fsync(descriptor)


def free_bytes(path: Path) -> int:
    """Bytes free for this user on the file system of a path."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def swap_names(folder: int, name: str, other: int, other_name: str) -> None:
    """Exchange two entries of open folders in one step. EOPNOTSUPP where the system cannot."""
    call = _swap_call()
    if call is None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    if call(folder, os.fsencode(name), other, os.fsencode(other_name), _SWAP):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@cache
def _swap_call() -> Any:
    name = "renameatx_np" if sys.platform == "darwin" else "renameat2"
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return call


class Folder:
    """An open folder. What is done in it by name stays in it, even if somebody puts a link where it was.

    Args:
        path: Where it is; a link in it is followed, as users name places.

    Attributes:
        path: The same, for messages and for readers.
    """

    def __init__(self, path: Path, *, within: int | None = None, follow: bool = True) -> None:
        self.path = path
        flags = os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
        name = path if within is None else path.name
        try:
            self._descriptor = os.open(name, os.O_RDONLY | flags, dir_fd=within)
        except PermissionError:
            if not hasattr(os, "O_PATH"):
                raise
            # A folder that may be written to, and not listed.
            self._descriptor = os.open(name, os.O_PATH | flags, dir_fd=within)

    def close(self) -> None:
        """Give it back."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            close_read(descriptor)

    def make(self, name: str, mode: int = 0o777) -> Folder:
        """Make a folder in it, and open that."""
        os.mkdir(name, mode, dir_fd=self._descriptor)
        return self.enter(name)

    def enter(self, name: str) -> Folder:
        """Open a folder in it that is no link."""
        return Folder(self.path / name, within=self._descriptor, follow=False)

    def create(self, name: str) -> int:
        """Create a file in it that was not there; returns a descriptor for reading and writing."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(name, flags, 0o666, dir_fd=self._descriptor)

    def open_again(self, name: str) -> int:
        """Open a file in it that was created before, to go on writing."""
        return os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._descriptor)

    def names(self) -> list[str]:
        """Names of what is in it."""
        return sorted(os.listdir(self._descriptor))

    def names_below(self, name: str) -> set[str]:
        """Names of all that is in a folder in it, at any depth; links are not followed."""
        inner = self.enter(name)
        try:
            found = set()
            for entry in inner.names():
                found.add(entry)
                status = inner.status(entry)
                if status is not None and stat.S_ISDIR(status.st_mode):
                    found |= {f"{entry}/{below}" for below in inner.names_below(entry)}
            return found
        finally:
            inner.close()

    def status(self, name: str) -> os.stat_result | None:
        """What the system knows of an entry, itself where it is a link; None if there is none."""
        with contextlib.suppress(FileNotFoundError):
            return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        return None

    def set_mode(self, name: str, mode: int) -> None:
        """Set who may do what with an entry."""
        os.chmod(name, mode, dir_fd=self._descriptor)

    def rename(self, name: str, folder: Folder, target: str) -> None:
        """Move an entry, in place of a file that is there or an empty folder."""
        os.rename(name, target, src_dir_fd=self._descriptor, dst_dir_fd=folder._descriptor)

    def link(self, name: str, folder: Folder, target: str) -> None:
        """Give a file a second name, which must be free."""
        os.link(name, target, src_dir_fd=self._descriptor, dst_dir_fd=folder._descriptor, follow_symlinks=False)

    def swap(self, name: str, folder: Folder, target: str) -> None:
        """Exchange two entries in one step; see `swap_names`."""
        swap_names(self._descriptor, name, folder._descriptor, target)

    def remove(self, name: str) -> None:
        """Remove a file, or nothing if there is none."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def remove_tree(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it, as far as it can be; links are not followed."""
        with contextlib.suppress(OSError):
            self.remove(name)
            return
        with contextlib.suppress(OSError):
            inner = self.enter(name)
            try:
                with contextlib.suppress(OSError):
                    os.fchmod(inner._descriptor, 0o700)  # one that nobody may write to cannot be emptied
                for entry in inner.names():
                    inner.remove_tree(entry)
            finally:
                inner.close()
            os.rmdir(name, dir_fd=self._descriptor)

    def sync(self) -> None:
        """Wait until its entries are on the disk, where the file system lets us."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            if error.errno not in NOT_POSSIBLE_HERE:
                raise

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[bool]:
        """Hold a lock file while the context lasts. It goes with the process, however that ends.

        Gives whether it is held: file systems differ in it, and another user may have left a file that is not ours to
        open. So it keeps nothing right by itself; it tells a second run at once.

        Raises:
            BlockingIOError: Somebody else holds it.
        """
        descriptor = self._lock(name)
        try:
            yield descriptor is not None
        finally:
            if descriptor is not None:
                with contextlib.suppress(OSError):  # a lock that stays behind locks nobody out
                    self.remove(name)
                close_read(descriptor)

    def _lock(self, name: str) -> int | None:
        flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        while True:
            try:
                descriptor = os.open(name, flags, 0o666, dir_fd=self._descriptor)
            except PermissionError:
                return None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held, there = os.fstat(descriptor), self.status(name)
                if there is not None and there.st_ino == held.st_ino:
                    return descriptor
                # Who held it took it away between our opening and our locking: that one is nobody's.
            except BlockingIOError:
                close_read(descriptor)
                raise
            except OSError as error:
                close_read(descriptor)
                with contextlib.suppress(OSError):
                    self.remove(name)
                if error.errno not in {*NOT_POSSIBLE_HERE, errno.ENOLCK}:
                    raise
                return None
            close_read(descriptor)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Folder]:
    """A folder of our own among the system's temporary files, for as long as the context lasts."""
    around = Folder(Path(tempfile.gettempdir()))
    name = f"lora-cli-{secrets.token_hex(8)}"
    try:
        folder = around.make(name, 0o700)
        try:
            yield folder
        finally:
            folder.close()
            around.remove_tree(name)
    finally:
        around.close()
