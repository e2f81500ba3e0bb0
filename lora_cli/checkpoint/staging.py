"""Writing outputs: complete and synced, or absent.

Everything is written into a folder of a recognisable name beside the target, synced, and renamed into place. Nothing
but this and `staged` creates, renames or removes files.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.checkpoint.staged import NOT_POSSIBLE_HERE, Scratch, StagedFile, sync_folder, write_errors
from lora_cli.errors import DiskFullError, OutputExistsError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


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
        self.published = False
        check_target(target, folder=folder, may_replace=may_replace)
        self.place = target.parent / f".{target.name}.lora-cli-{secrets.token_hex(6)}"

    @contextlib.contextmanager
    def opened(self) -> Iterator[Staging]:
        """The staging folder for as long as the context lasts; whatever ends it, even a signal, the folder goes."""
        try:
            with write_errors(self.target.name):
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
        scratch = Scratch(self.place / ".scratch", self.target.name)
        self._scratches.append(scratch)
        return scratch

    def create(self, name: str, size: int) -> StagedFile:
        """Create one output file of `size` bytes; `name` may hold a sub-folder."""
        path = self.place / name
        with write_errors(name):
            path.parent.mkdir(exist_ok=True)
        file = StagedFile(path, name, size)
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
        with write_errors(self.target.name):
            if self.folder:
                self._publish_folder()
            else:
                self._publish_files()
            self.published = True
            done()
            for name in outdated:
                (self.target.parent / name).unlink(missing_ok=True)
            sync_folder(self.target.parent)

    def withdraw(self) -> None:
        """Take back what was published, because what belongs to it could not be; what it replaced is gone."""
        if not self.published:
            return
        self.published = False
        if self.folder:
            self.target.rename(self.place)  # which goes when `opened` ends
            return
        for file in self._files:
            (self.target.parent / file.name).unlink(missing_ok=True)

    def _publish_folder(self) -> None:
        for path in {self.place, *(file.path.parent for file in self._files)}:
            sync_folder(path)
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
            if error.errno not in NOT_POSSIBLE_HERE:
                raise
            staged.rename(target)


@contextlib.contextmanager
def together(first: Staging, second: Staging) -> Iterator[None]:
    """Have two outputs published that make sense only together: if the second is not, the first is taken back."""
    try:
        yield
    except BaseException:
        if not second.published:
            first.withdraw()
        raise


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
