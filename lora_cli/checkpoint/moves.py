"""Putting finished outputs in their places, so that it can be taken back."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from lora_cli.checkpoint.files import NOT_POSSIBLE_HERE, Folder
from lora_cli.checkpoint.staged import ASIDE
from lora_cli.errors import OutputExistsError

if TYPE_CHECKING:
    from collections.abc import Callable


class Move:
    """Putting one name in its place, so that it can be taken back until the staging folder goes.

    Attributes:
        replaced: What is called in the staging folder now what stood there, if anything did.
    """

    def __init__(self, staged: Folder, name: str, parent: Folder, target: str) -> None:
        self._staged = staged
        self._name = name
        self._parent = parent
        self._target = target
        self._aside = f"{name}{ASIDE}"
        self._back: Callable[[], None] = lambda: None
        self.replaced: str | None = None

    def make(self, *, replace: bool) -> None:
        """Put it there; what it replaces stays in the staging folder.

        Raises:
            OutputExistsError: Something is there that is not to be replaced.
        """
        old = self._parent.status(self._target)
        folder = stat.S_ISDIR(getattr(self._staged.status(self._name), "st_mode", 0))
        try:
            empty = old if old and folder and stat.S_ISDIR(old.st_mode) and not self._full() else None
            if folder and old:
                self._staged.set_mode(self._name, stat.S_IMODE(old.st_mode))
            if old is None or empty:
                self._place(link=not folder, empty=empty)
            elif replace:
                self._replace(folder=folder)
            else:
                raise FileExistsError
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.ENOTDIR} or isinstance(error, FileExistsError):
                where = self._parent.path / self._target
                raise OutputExistsError("The output was made by somebody else meanwhile", file=where) from error
            raise

    def put_aside(self) -> None:
        """Let what is at the target go with the staging folder."""
        self._parent.rename(self._target, self._staged, self._name)
        self._back = lambda: self._staged.rename(self._name, self._parent, self._target)

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

    def _place(self, *, link: bool, empty: os.stat_result | None) -> None:
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
                self._parent.set_mode(self._target, stat.S_IMODE(empty.st_mode))

        self._back = back

    def _replace(self, *, folder: bool) -> None:
        """Where something is: in one step if the system can exchange two names."""
        try:
            self._swap()
        except OSError as error:
            if error.errno not in NOT_POSSIBLE_HERE:
                raise
        else:
            self._back, self.replaced = self._swap, self._name
            return
        self._keep_aside(link=not folder)
        self.replaced = self._aside
        self._back = lambda: self._staged.rename(self._aside, self._parent, self._target)
        self._staged.rename(self._name, self._parent, self._target)
        old = self._back

        def back() -> None:
            self._parent.rename(self._target, self._staged, self._name)
            old()

        self._back = back

    def _keep_aside(self, *, link: bool) -> None:
        """Put what is there into the staging folder: by a second name, so that it stays, or by moving it."""
        if link:
            try:
                self._parent.link(self._target, self._staged, self._aside)
            except OSError as error:
                if error.errno not in NOT_POSSIBLE_HERE:
                    raise
            else:
                return
        self._parent.rename(self._target, self._staged, self._aside)

    def _swap(self) -> None:
        self._staged.swap(self._name, self._parent, self._target)
