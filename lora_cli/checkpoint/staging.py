"""Writing outputs: complete and synced, or absent.

Everything is written into a folder of a recognisable name beside the target, synced, and renamed into place.
"""

from __future__ import annotations

import contextlib
import secrets
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.checkpoint import files
from lora_cli.checkpoint.files import Folder
from lora_cli.checkpoint.journal import JOURNAL, Finished, Journal
from lora_cli.checkpoint.moves import Move
from lora_cli.checkpoint.staged import ASIDE, Scratch, StagedFile, hidden_name, write_errors
from lora_cli.checkpoint.targets import check_target
from lora_cli.errors import (
    LockedError,
    LoraCliError,
    OutputExistsError,
    UnsafeInputError,
    WriteError,
)
from lora_cli.signals import held_back

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping

PATIENCE = 2.0
"""Seconds that a lock of somebody else is waited for."""

OUTPUT = "output"
"""What the output is called in its staging folder, apart from what else the work puts there."""


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
        self._moves: list[Move] = []
        self._stuck = False
        self._journal: Journal | None = None
        self._keep = False
        self.replacing = False
        check_target(target, folder=folder, may_replace=may_replace)
        self.name = hidden_name(target.name, secrets.token_hex(6))
        self.place = target.parent / self.name / OUTPUT
        self._around: list[Folder] = []
        self._taken = 0
        self.locked = False

    @contextlib.contextmanager
    def opened(self) -> Iterator[Staging]:
        """The staging folder for as long as the context lasts; whatever ends it, even a signal, the folder goes.

        Raises:
            LockedError: Another run writes to the same target.
            WriteError: Nobody may write there.
        """
        with contextlib.ExitStack() as stack:
            # A signal waits: it must not come between making something and noting that it is to go.
            with write_errors(self.target.name), held_back():
                self._parent = Folder(self.target.parent)
                stack.callback(self._parent.close)
                stack.enter_context(self._locked())
                stack.push(self._leave)
                self.replacing = self._may_replace()
                self._around.append(self._parent.make(self.name, 0o700))
                self._folders[""] = self.work.make(OUTPUT)
                if self.folder:
                    self._keep_mode("")
            yield self

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            self.locked = self._lock(stack)
            try:
                yield
            finally:
                with held_back():
                    stack.close()

    def _lock(self, stack: contextlib.ExitStack) -> bool:
        """Lock the target; a moment later if need be: workers of a run that was killed end soon after it."""
        name = hidden_name(self.target.name, "lock")
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return stack.enter_context(self._parent.locked(name))
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise LockedError("Another run is writing this output", file=self.target) from error
            time.sleep(0.1)

    def _leave(self, _: object, error: BaseException | None, __: object) -> None:
        if self._stuck and isinstance(error, LoraCliError):
            error.details += (f"it could not be taken back, so nothing was removed: {self.name} has the rest",)
        self._clear()

    def _clear(self) -> None:
        """Take everything away that is not published. What was replaced is in the staging folder by then."""
        with held_back():
            for file in self._files:
                file.abandon()
            for scratch in self._scratches:
                scratch.close()
            if self._journal:
                self._journal.close()
            if not (self._stuck or self.kept):
                for _ in range(2):  # once more what could not be taken away
                    self._parent.remove_tree(self.name)
            for folder in (*self._folders.values(), *self._around):
                folder.close()

    @property
    def work(self) -> Folder:
        """The open staging folder, for files of the work; the output lies in a folder of its own in it."""
        return self._around[0]

    @property
    def kept(self) -> int:
        """How many finished files stay for another run, if the output is not published."""
        if self.published or not self._keep:
            return 0
        return self._journal.count if self._journal else self._taken

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
        """A place for bytes of the work, which are no part of the output."""
        scratch = Scratch(self.work, "scratch", self.target.name)
        self._scratches.append(scratch)
        return scratch

    def create(self, name: str, size: int) -> StagedFile:
        """Create one output file of `size` bytes; `name` may hold a sub-folder.

        Raises:
            UnsafeInputError: The file system takes its name for that of another output file.
            WriteError: It cannot be created.
        """
        around, _, last = name.rpartition("/")
        try:
            if around not in self._folders:
                with write_errors(name):
                    self._folders[around] = self._folders[""].make(around)
                    self._keep_mode(around)
            file = StagedFile(self._folders[around], last, name, size)
        except WriteError as error:
            if not isinstance(error.__cause__, FileExistsError):
                raise
            # Names that differ by case or by the form of an accent alone; the folder was empty when we made it.
            raise UnsafeInputError(
                "Two files of the output have one name on this file system",
                file=name,
                hint="choose another disk with -o, where names that differ by case or accents alone are two",
            ) from error
        self._files.append(file)
        if len(self._files) > files.open_at_once():
            file.rest()
        with write_errors(name):
            self._keep_mode(name)
        return file

    def take_over(self, left: str, count: int) -> None:
        """Go on in the staging folder that another run has left, and not in our own, which is still empty.

        From here on it stays, whatever becomes of this run.

        Args:
            left: Its name.
            count: How many files are finished in it.

        Raises:
            WriteError: It cannot be moved, or is gone.
        """
        with write_errors(left), held_back():
            # By moving it: of two runs that want it, where locks do nothing, one gets it.
            self._folders.pop("").close()
            self._around.pop().close()
            self._parent.remove_tree(self.name)
            self._parent.rename(left, self._parent, self.name)
            self._keep, self._taken = True, count
            self._around.append(self._parent.enter(self.name))
            self._folders[""] = self.work.enter(OUTPUT)

    def clean(self, keep: Container[str], *, gathered: Container[str]) -> None:
        """Take everything out of a staging folder that was taken over, but for files of these names."""
        with write_errors(self.target.name):
            for folder, stays in ((self._folders[""], keep), (self.work, gathered)):
                for name in folder.names():
                    if name not in stays and (folder, name) not in ((self.work, OUTPUT), (self.work, JOURNAL)):
                        folder.remove_tree(name)

    def adopt(self, name: str, size: int) -> StagedFile:
        """Take an output file as it is, which lies in a staging folder that was taken over, finished and checked."""
        file = StagedFile.taken_over(self._folders[""], name, name, size)
        self._files.append(file)
        with write_errors(name):
            self._keep_mode(name)
        return file

    def journal(self, facts: Mapping[str, str], finished: Iterable[Finished], *, keep: bool) -> Journal:
        """A journal for this run.

        Args:
            facts: What the run was asked for.
            finished: What was finished before it began.
            keep: Whether finished files stay for another run, if this one does not publish its output.
        """
        with write_errors(self.target.name):
            self._journal = Journal(self.work, facts, finished)
        self._keep = keep
        return self._journal

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
            stood = self._standing()
            replace = self._replaces()
            for folder in self._folders.values():
                folder.sync()
            try:
                self._move(replace=replace, outdated=outdated)
                if self.folder and self._moves[0].replaced and stood != self._standing(self._moves[0].replaced):
                    raise OutputExistsError("Something was added to the output meanwhile", file=self.target)
                self._parent.sync()
            except BaseException:
                self.withdraw()
                raise
            done()

    def withdraw(self) -> None:
        """Take back what was published, because what belongs to it could not be; what it replaced returns.

        Where even that fails, nothing is removed any more: all there was is in the target or in the staging folder.
        """
        with held_back():
            try:
                while self._moves:
                    self._moves[-1].take_back()
                    self._moves.pop()
            except OSError:
                self._stuck = True

    def _standing(self, replaced: str | None = None) -> set[str]:
        """Names of all that is in an output folder that stands there, or, after that, in what was replaced."""
        if replaced:
            return self.work.names_below(replaced)
        stands = self.folder and self.target.is_dir() and not self.target.is_symlink()
        return self._parent.names_below(self.target.name) if stands else set()

    def _replaces(self) -> bool:
        """Whether something is to be replaced, looked at once more: somebody may have been here meanwhile."""
        if self.folder:
            check_target(self.target, folder=True, may_replace=self._may_replace)
        return self._may_replace()

    def _keep_mode(self, name: str) -> None:
        """Let something new have the mode of what it replaces, before it is filled: nobody sees more than before."""
        old = (self.target if self.folder else self.target.parent) / name
        if not (self.replacing or not name) or old.is_symlink() or not old.exists():
            return
        mode = stat.S_IMODE(old.stat().st_mode) | (stat.S_IRWXU if old.is_dir() else 0)
        around, _, last = name.rpartition("/")
        folder, last = (self._folders[around], last) if name else (self.work, OUTPUT)
        folder.set_mode(last, mode)

    def _move(self, *, replace: bool, outdated: Iterable[str]) -> None:
        """Put what is outdated aside, and the folder, or each file, in its place."""
        staged = self._folders[""]
        if self.folder:
            moves = [Move(self.work, OUTPUT, self._parent, self.target.name)]
        else:
            # What belongs to the tensors is there before them, and the receipt comes last.
            first, *others = [Move(staged, file.name, self._parent, file.name) for file in self._files]
            moves = [*others[:-1], first, *others[-1:]]
        for name in outdated:
            self._moves.append(Move(staged, f"{name}{ASIDE}", self._parent, name))
            self._moves[-1].put_aside()
        for move in moves:
            self._moves.append(move)
            move.make(replace=replace)


@contextlib.contextmanager
def together(first: Staging, second: Staging) -> Iterator[None]:
    """Have two outputs published that make sense only together: if the second is not, the first is taken back."""
    try:
        yield
    except BaseException:
        if not second.published:
            first.withdraw()
        raise
