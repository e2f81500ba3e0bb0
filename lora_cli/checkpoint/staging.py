"""Writing outputs: complete and synced, or absent.

Everything is written into a folder of a recognisable name beside the target, synced, and renamed into place.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.checkpoint import files
from lora_cli.checkpoint.files import NOT_POSSIBLE_HERE, Folder
from lora_cli.checkpoint.staged import Scratch, StagedFile, hidden_name, write_errors
from lora_cli.errors import DiskFullError, LockedError, OutputExistsError, UsageError
from lora_cli.signals import held_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_ASIDE = "-old"
"""What is added to the name of what is replaced, where two names cannot be exchanged in one step."""


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
        self._folders: dict[str, Folder] = {}
        self._moves: list[_Move] = []
        self._stuck = False
        check_target(target, folder=folder, may_replace=may_replace)
        self.name = hidden_name(target.name, secrets.token_hex(6))
        self.place = target.parent / self.name

    @contextlib.contextmanager
    def opened(self) -> Iterator[Staging]:
        """The staging folder for as long as the context lasts; whatever ends it, even a signal, the folder goes.

        Raises:
            LockedError: Another run writes to the same target.
            WriteError: Nobody may write there.
        """
        with contextlib.ExitStack() as stack:
            with write_errors(self.target.name):
                self._parent = Folder(self.target.parent)
                stack.callback(self._parent.close)
                stack.enter_context(self._locked())
                stack.callback(self._clear)
                self._folders[""] = self._parent.make(self.name)
            yield self

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._parent.locked(hidden_name(self.target.name, "lock")))
            except BlockingIOError as error:
                raise LockedError("Another run is writing this output", file=self.target) from error
            yield

    def _clear(self) -> None:
        """Take everything away that is not published. What was replaced is in the staging folder by then."""
        with held_back():
            for file in self._files:
                file.abandon()
            with contextlib.suppress(OSError):  # they go with the folder
                for scratch in self._scratches:
                    scratch.abandon()
            if not self._stuck:
                for name in (self.name, f"{self.name}{_ASIDE}"):
                    self._parent.remove_tree(name)
            for folder in self._folders.values():
                folder.close()

    @property
    def work(self) -> Folder:
        """The open staging folder, for files of the work that go before the output is published."""
        return self._folders[""]

    @property
    def published(self) -> bool:
        """Whether the output is in its place."""
        return bool(self._moves)

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
        scratch = Scratch(self._folders[""], ".scratch", self.target.name)
        self._scratches.append(scratch)
        return scratch

    def create(self, name: str, size: int) -> StagedFile:
        """Create one output file of `size` bytes; `name` may hold a sub-folder."""
        around, _, last = name.rpartition("/")
        if around not in self._folders:
            with write_errors(name):
                self._folders[around] = self._folders[""].make(around)
        file = StagedFile(self._folders[around], last, name, size)
        self._files.append(file)
        return file

    def write_small(self, name: str, data: bytes) -> None:
        """Write and sync a small file whole."""
        file = self.create(name, len(data))
        file.write(0, data)
        file.finish()

    def publish(self, done: Callable[[], None] = lambda: None, outdated: Iterable[str] = ()) -> None:
        """Put everything in its place: for a folder by one rename, for files in the order they were created.

        A signal waits meanwhile. If one part cannot be put there, those before it are taken back.

        Args:
            done: Is called as soon as the output is complete in its place.
            outdated: Names of small files beside a file that was replaced, which tell of what it was before.

        Raises:
            OutputExistsError: Somebody made the target in the meantime.
            WriteError: The rename failed; the target is as it was before.
        """
        with write_errors(self.target.name), held_back():
            for scratch in self._scratches:
                scratch.abandon()
            replace = self._replaces()
            if replace:
                self._keep_modes()
            for folder in self._folders.values():
                folder.sync()
            try:
                self._move(replace=replace)
                self._parent.sync()
            except BaseException:
                self.withdraw()
                raise
            done()
            for name in outdated:
                self._parent.remove(name)
            self._parent.sync()

    def withdraw(self) -> None:
        """Take back what was published, because what belongs to it could not be; what it replaced returns.

        Where even that fails, nothing is removed any more: all there was is in the target or in the staging folder.
        """
        try:
            while self._moves:
                self._moves.pop().take_back()
        except OSError:
            self._stuck = True

    def _replaces(self) -> bool:
        """Whether something is to be replaced, looked at once more: somebody may have been here meanwhile."""
        if self.folder:
            check_target(self.target, folder=True, may_replace=self._may_replace)
        return self._may_replace()

    def _keep_modes(self) -> None:
        """Let files have the modes of those that they replace, so that nobody sees more than before."""
        root = self.target if self.folder else self.target.parent
        for file in self._files:
            around, _, name = file.name.rpartition("/")
            old = root / file.name
            if old.is_file() and not old.is_symlink():
                self._folders[around].set_mode(name, stat.S_IMODE(old.stat().st_mode))

    def _move(self, *, replace: bool) -> None:
        """Put the folder, or each file, in its place."""
        staged = self._folders[""]
        if self.folder:
            moves = [_Move(self._parent, self.name, self._parent, self.target.name)]
        else:
            # What belongs to the tensors is there before them, and the receipt comes last.
            first, *others = [_Move(staged, file.name, self._parent, file.name) for file in self._files]
            moves = [*others[:-1], first, *others[-1:]]
        for move in moves:
            self._moves.append(move)
            move.make(replace=replace)


class _Move:
    """Putting one name in its place, so that it can be taken back until the staging folder goes."""

    def __init__(self, staged: Folder, name: str, parent: Folder, target: str) -> None:
        self._staged = staged
        self._name = name
        self._parent = parent
        self._target = target
        self._aside = f"{name}{_ASIDE}"
        self._back: Callable[[], None] = lambda: None

    def make(self, *, replace: bool) -> None:
        """Put it there; what it replaces stays in the staging folder.

        Raises:
            OutputExistsError: Something is there that is not to be replaced.
        """
        old = self._parent.status(self._target)
        folder = stat.S_ISDIR(getattr(self._staged.status(self._name), "st_mode", 0))
        try:
            if old is None or (folder and stat.S_ISDIR(old.st_mode) and not self._full()):
                self._place(link=not folder, empty=old is not None)
            elif replace:
                if folder:
                    self._staged.set_mode(self._name, stat.S_IMODE(old.st_mode))
                self._replace(folder=folder)
            else:
                raise FileExistsError
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.ENOTDIR} or isinstance(error, FileExistsError):
                where = self._parent.path / self._target
                raise OutputExistsError("The output was made by somebody else meanwhile", file=where) from error
            raise

    def take_back(self) -> None:
        """Undo what was done, as far as it was."""
        back, self._back = self._back, lambda: None
        back()

    def _full(self) -> bool:
        there = self._parent.enter(self._target)
        try:
            return bool(there.names())
        finally:
            there.close()

    def _place(self, *, link: bool, empty: bool) -> None:
        """Where nothing is: a hard link refuses to overwrite, as a rename of a file does not."""
        if link:
            try:
                self._staged.link(self._name, self._parent, self._target)
            except OSError as error:
                if error.errno not in NOT_POSSIBLE_HERE:
                    raise
            else:
                self._back = lambda: self._parent.remove(self._target)
                return
        self._staged.rename(self._name, self._parent, self._target)

        def back() -> None:
            self._parent.rename(self._target, self._staged, self._name)
            if empty:
                self._parent.make(self._target).close()

        self._back = back

    def _replace(self, *, folder: bool) -> None:
        """Where something is: in one step if the system can exchange two names."""
        try:
            self._swap()
        except OSError as error:
            if error.errno not in NOT_POSSIBLE_HERE:
                raise
        else:
            self._back = self._swap
            return
        if folder:
            self._parent.rename(self._target, self._staged, self._aside)
            self._back = lambda: self._staged.rename(self._aside, self._parent, self._target)
        else:
            with contextlib.suppress(OSError):  # without hard links what was there is gone
                self._parent.link(self._target, self._staged, self._aside)
                self._back = lambda: self._staged.rename(self._aside, self._parent, self._target)
        self._staged.rename(self._name, self._parent, self._target)
        old = self._back

        def back() -> None:
            self._parent.rename(self._target, self._staged, self._name)
            old()

        self._back = back

    def _swap(self) -> None:
        self._staged.swap(self._name, self._parent, self._target)


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
    if not target.exists() or (folder and target.is_dir() and not files.listed(target)):
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
    return files.free_bytes(target.parent if target.parent.exists() else Path.cwd())
