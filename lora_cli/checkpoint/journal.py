"""The journal of a run: which files of its output are finished, so that another run can go on where it was cut off.

It lies in the staging folder, one JSON document a line: what the run was asked for, and then each finished file. It is
written as work goes on and goes with the folder; what a run that was cut off left is checked before it is trusted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from lora_cli.checkpoint.files import Folder
from lora_cli.checkpoint.source import read_whole
from lora_cli.checkpoint.staged import Span, StagedFile, write_errors
from lora_cli.errors import LoraCliError

JOURNAL = "journal"
_SCHEMA = "lora-cli/journal/1"
_LIMIT = 1 << 30
"""Bytes of a journal that are read: what was found in a hundred thousand units, and the gains of wide layers."""
_NOT_JSON = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
"""What decoding says of bytes that are none of ours: other fields, nested too deep, no UTF-8."""


class Begun(msgspec.Struct, frozen=True):
    """What a run was asked for.

    Attributes:
        facts: Everything that decides what is written, each by its name.
        schema: The version of the journal.
    """

    facts: dict[str, str]
    schema: str = _SCHEMA


class Finished(msgspec.Struct, frozen=True):
    """A file of the output that is complete and synced.

    Attributes:
        name: Its name.
        digest: Its digest, see `checkpoint.digests`.
        found: What each tap found in its units, in their order, as JSON.
        spans: Where what was gathered of it lies, see `staged.Scratch`.
        seal: The digest of that.
    """

    name: str
    digest: str
    found: tuple[msgspec.Raw, ...]
    spans: tuple[Span, ...] = ()
    seal: str = ""


class Journal:
    """Writes the journal of a run, a line at a time, each synced.

    Args:
        folder: The staging folder.
        facts: What the run was asked for.
    """

    def __init__(self, folder: Folder, facts: Mapping[str, str]) -> None:
        self._folder = folder
        self._end = 0
        self._begun = msgspec.json.encode(Begun(dict(facts)))
        self._file: StagedFile | None = None
        self.count = 0

    def note(self, finished: Finished) -> None:
        """Write that a file is finished. The first one makes the journal: before it there is nothing to go on from."""
        if self._file is None:
            self._file = StagedFile(self._folder, JOURNAL, JOURNAL, 0)
            self._append(self._begun)
        self._append(msgspec.json.encode(finished))
        self._file.sync()
        with write_errors(JOURNAL):
            self._folder.sync()
        self.count += 1

    def _append(self, line: bytes) -> None:
        assert self._file is not None  # noqa: S101 (made above)
        self._file.write(self._end, line + b"\n")
        self._end += len(line) + 1

    def close(self) -> None:
        """Close it; it stays where it is."""
        if self._file is not None:
            self._file.abandon()


def read_journal(folder: Path) -> tuple[Begun, list[Finished]] | None:
    """Read the journal of a folder that a run left; None where there is none that can be read.

    A last line that was cut off says nothing, and nothing after it is read.
    """
    if not (folder / JOURNAL).is_file() or (folder / JOURNAL).is_symlink():
        return None
    finished: list[Finished] = []
    with contextlib.suppress(LoraCliError, *_NOT_JSON):
        first, *lines = read_whole(folder / JOURNAL, limit=_LIMIT).split(b"\n")
        begun = msgspec.json.decode(first, type=Begun)
        if begun.schema != _SCHEMA:
            return None
        with contextlib.suppress(*_NOT_JSON):
            for line in lines[:-1]:
                finished.append(msgspec.json.decode(line, type=Finished))
        return begun, finished
    return None
