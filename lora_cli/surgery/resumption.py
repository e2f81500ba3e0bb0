"""What of an output is finished: noted while it is made, and taken from what another run has left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from lora_cli.checkpoint.checkpoint import open_shard
from lora_cli.checkpoint.digests import shard_digest
from lora_cli.checkpoint.journal import Finished, Journal
from lora_cli.checkpoint.staged import StagedFile
from lora_cli.errors import MalformedFileError
from lora_cli.surgery.units import Unit

if TYPE_CHECKING:
    from lora_cli.surgery.filling import Tap

Found = list[list[Any]]
"""What each tap found in a unit."""


class Resumption:
    """Which files of an output are finished.

    Args:
        finished: Those that were when this run began, by their place in the plan.
        journal: Where others are noted; nowhere unless given.
        read_back: Read a file that is finished for its digest, where no tap knows it; else it is not noted.

    Attributes:
        finished: As above.
    """

    def __init__(
        self, finished: Mapping[int, Finished] | None = None, journal: Journal | None = None, *, read_back: bool = False
    ) -> None:
        self.finished = dict(finished or {})
        self._journal = journal
        self._read_back = read_back
        self._units: Mapping[int, Sequence[Unit]] = {}
        self._found: dict[int, Found] = {}

    def begin(self, units: Mapping[int, Sequence[Unit]], taps: Sequence[Tap]) -> None:
        """Let taps have what was found in the files that are finished.

        Args:
            units: All units of each file, in their order.
            taps: What watches them.

        Raises:
            MalformedFileError: The journal says something else than what taps find.
        """
        self._units = units
        for number, one in self.finished.items():
            try:
                columns = [
                    msgspec.json.decode(found, type=list[list[tap.kind]])  # type: ignore[name-defined]
                    for tap, found in zip(taps, one.found, strict=True)
                ]
                for tap, column in zip(taps, columns, strict=True):
                    for unit, findings in zip(units[number], column, strict=True):
                        for finding in findings:
                            tap.take(unit, finding)
                if any(tap.digest(number) not in ("", one.digest) for tap in taps):
                    raise ValueError("what was found gives another file")
            except (msgspec.MsgspecError, ValueError, LookupError) as error:
                raise MalformedFileError(
                    "The journal of the run that was cut off is damaged",
                    file=one.name,
                    hint="run without --resume to begin anew",
                ) from error

    def keep(self, unit: Unit, found: Found) -> None:
        """Keep what was found in a unit until its file is finished."""
        if self._journal:
            self._found[id(unit)] = found

    def note(self, number: int, file: StagedFile, taps: Sequence[Tap]) -> None:
        """Note that a file is finished, where its digest is to be had."""
        if self._journal is None:
            return
        nothing: Found = [[] for _ in taps]  # of what was copied while torch was loading
        by_unit = [self._found.pop(id(unit), nothing) for unit in self._units[number]]
        digest = next(filter(None, (tap.digest(number) for tap in taps)), "")
        if not digest and self._read_back:
            digest = shard_digest(open_shard(file.path))
        if not digest:
            return
        places = [tap.gathered(number) for tap in taps]
        spans, seal = next((place for place in places if place[0]), ((), ""))
        columns = (msgspec.Raw(msgspec.json.encode(list(column))) for column in zip(*by_unit, strict=True))
        self._journal.note(Finished(file.path.name, digest, tuple(columns), spans, seal))
