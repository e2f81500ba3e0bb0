"""Filling staged files: units are done side by side, taps are handed what they find, complete files are synced."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from safetensors import SafetensorError, safe_open

from lora_cli.checkpoint.advice import crowds, forget
from lora_cli.checkpoint.staged import Span, StagedFile
from lora_cli.errors import WriteError
from lora_cli.progress import Progress
from lora_cli.surgery.ahead import while_torch_loads
from lora_cli.surgery.budget import Budget
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.resumption import Resumption
from lora_cli.surgery.units import Unit, units_of
from lora_cli.surgery.workers import run_units

if TYPE_CHECKING:
    from lora_cli.surgery.engine import Pieces, Workshop


class Tap(Protocol):
    """Watches the pieces of a unit as they pass, in the worker's process, and is told in ours what it found.

    What it finds goes into the journal of the run too, from which another takes it that goes on.
    """

    @property
    def kind(self) -> Any:
        """The type of what is found, as msgspec reads it."""
        ...

    def watch(self, unit: Unit, pieces: Pieces, found: list[Any]) -> Pieces:
        """Pass pieces on; append to `found` what is to be known of the unit."""
        ...

    def take(self, unit: Unit, found: Any) -> None:
        """Keep what was found in a unit."""
        ...

    def digest(self, number: int) -> str:
        """Digest of an output file whose units were all taken; nothing if this tap does not know it."""
        ...

    def gathered(self, number: int) -> tuple[tuple[Span, ...], str]:
        """Where bytes that were gathered of a file lie, synced, and their digest; nothing if there are none."""
        ...


class Filler:
    """Fills the files of a plan.

    Args:
        plan: What to write.
        staged: Its files, in their order.
        see_copies: Whether tensors that are only copied pass the taps too.
        resumption: Which files are finished already, and where to note others.
    """

    def __init__(
        self, plan: Plan, staged: Sequence[StagedFile], *, see_copies: bool, resumption: Resumption | None = None
    ) -> None:
        self._plan = plan
        self._staged = staged
        self._resumption = resumption or Resumption()
        self._see_copies = see_copies
        self._taps: Sequence[Tap] = ()
        self._crowds = crowds(2 * sum(file.size for file in plan.files))

    def fill(self, taps: Callable[[], Sequence[Tap]], budget: Budget, progress: Progress) -> None:
        """Write all files, and sync them.

        Args:
            taps: Makes what watches the pieces.
            budget: Threads and buffer sizes.
            progress: Hears of every unit.
        """
        nbytes = sum(file.size for file in self._plan.files)
        progress.begin(self._plan.operation, nbytes)
        files = enumerate(self._plan.files)
        by_file = {number: list(units_of(number, file, seen=self._see_copies)) for number, file in files}
        units = [unit for number in by_file if number not in self._resumption.finished for unit in by_file[number]]
        copies = [unit for unit in units if unit.source is not None]
        alone = budget.threads == 1  # then there is to be no other process
        copied = [] if alone else copies[: while_torch_loads(copies, self._copy_ahead, lambda unit: unit.nbytes)]
        self._taps = taps()
        self._resumption.begin(by_file, self._taps)
        progress.advance(sum(self._plan.files[number].size for number in self._resumption.finished))
        from lora_cli.surgery.engine import Workshop

        done = _Files(self, Counter(unit.file for unit in units), progress)
        for unit in copied:
            done.count(unit)
        ahead = {id(unit) for unit in copied}
        rest = [unit for unit in units if id(unit) not in ahead]
        with done.syncing():
            for unit, found in run_units(
                rest, self._work, lambda: Workshop(budget.strip_bytes), budget.threads, nbytes=nbytes
            ):
                for tap, findings in zip(self._taps, found, strict=True):
                    for finding in findings:
                        tap.take(unit, finding)
                self._resumption.keep(unit, found)
                done.count(unit)
                done.hand_over(unit)

    def _work(self, unit: Unit, workshop: Workshop) -> list[list[Any]]:
        """Do one unit, in a worker; returns what each tap found."""
        found: list[list[Any]] = [[] for _ in self._taps]
        if unit.edit is not None:
            self._compute(unit, workshop, found)
        elif unit.source is not None:
            self._copy(unit)
        else:
            self._staged[unit.file].write(0, self._plan.files[unit.file].header.prefix)
        if self._crowds:
            _forget(unit)
        return found

    def _compute(self, unit: Unit, workshop: Workshop, found: list[list[Any]]) -> None:
        from lora_cli.surgery.readers import raw_bytes

        edit, staged = unit.edit, self._staged[unit.file]
        assert edit is not None  # noqa: S101 (who calls has looked)
        at = self._plan.files[unit.file].header.data_start + edit.begin
        pieces = workshop.pieces(edit, unit.begin, unit.end)
        for tap, finding in zip(self._taps, found, strict=True):
            pieces = tap.watch(unit, pieces, finding)
        # Closed at once when a write fails: what it holds open would stay so as long as the error is remembered.
        with contextlib.closing(pieces):
            for piece in pieces:
                if not edit.copies:
                    staged.write(at + piece.offset * piece.result.itemsize, raw_bytes(piece.result))

    def _copy(self, unit: Unit) -> None:
        assert unit.source is not None  # noqa: S101 (who calls has looked)
        with unit.source.open() as reader:
            self._staged[unit.file].copy(reader, unit.source_offset, unit.begin, unit.nbytes)

    def _copy_ahead(self, unit: Unit) -> None:
        self._copy(unit)
        self.start_writing(unit)
        if self._crowds and not self._see_copies:
            _forget(unit)

    def start_writing(self, unit: Unit) -> None:
        """Let the disk begin with what a unit has written."""
        begin = unit.begin
        if unit.edit is not None:
            edit, rows = unit.edit, max(1, unit.edit.matrix[0])
            begin = self._plan.files[unit.file].header.data_start + edit.begin + edit.nbytes * unit.begin // rows
        self._staged[unit.file].start_writing(begin, unit.nbytes)

    def finish(self, number: int) -> StagedFile:
        """Sync a file of which all units are done."""
        staged = self._staged[number]
        staged.finish(forget=self._crowds)
        # A second reader, which shares no code with ours.
        try:
            with safe_open(staged.path, framework="numpy") as opened:
                count = len(opened.keys())
        except (OSError, SafetensorError):
            count = -1
        if count != len(self._plan.files[number].edits):
            raise WriteError("The output does not read back as it was planned", file=staged.name)
        self._resumption.note(number, staged, self._taps)
        return staged


class _Files:
    """Counts what is done of each file, and has the disk waited for beside the work, which goes on meanwhile."""

    def __init__(self, filler: Filler, left: Counter[int], progress: Progress) -> None:
        self._filler = filler
        self._left = left
        self._progress = progress
        self._complete: list[int] = []
        self._finishing: list[Future[StagedFile]] = []
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="lora-cli")

    @contextlib.contextmanager
    def syncing(self) -> Iterator[None]:
        """On leaving without an error, all files are on the disk."""
        try:
            yield
            self._finish()
            self._tell(self._finishing)
        finally:
            self._disk.shutdown(cancel_futures=True)

    def count(self, unit: Unit) -> None:
        """Take note that a unit is done. Starts no thread: workers may still have to be forked."""
        self._progress.advance(0 if _only_looks(unit) else unit.nbytes)
        self._left[unit.file] -= 1
        if not self._left[unit.file]:
            self._complete.append(unit.file)

    def hand_over(self, unit: Unit) -> None:
        """Let the disk write what a unit has made, and sync the files that are complete."""
        if not _only_looks(unit):
            self._disk.submit(self._filler.start_writing, unit)
        self._finish()
        self._tell([future for future in self._finishing if future.done()])

    def _finish(self) -> None:
        self._finishing += [self._disk.submit(self._filler.finish, number) for number in self._complete]
        self._complete.clear()

    def _tell(self, done: list[Future[StagedFile]]) -> None:
        """Tell of files that are on the disk, or raise the error that they came to."""
        self._finishing = [future for future in self._finishing if future not in done]
        for future in done:
            file = future.result()
            self._progress.file_done(file.name, file.size)


def _forget(unit: Unit) -> None:
    """Say that what a unit was made from is not needed any more."""
    if unit.source is not None:
        source, offset, length = unit.source, unit.source_offset, unit.nbytes
    elif unit.edit is not None and unit.edit.fresh is None and not _only_looks(unit):
        stored, rows = unit.edit.source, max(1, unit.edit.matrix[0])
        source, offset = stored.shard.source, stored.offset + stored.nbytes * unit.begin // rows
        length = stored.nbytes * (unit.end - unit.begin) // rows
    else:
        return
    with source.open() as reader:
        forget(reader.descriptor, offset, length)


def _only_looks(unit: Unit) -> bool:
    """Whether a unit is of a tensor that another unit copies."""
    return unit.edit is not None and unit.edit.copies
