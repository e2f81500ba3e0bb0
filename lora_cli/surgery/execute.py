"""Executing a plan: staged files, filled by the engine, published together."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open

from lora_cli.checkpoint.advice import crowds, forget
from lora_cli.checkpoint.sidefiles import SideFile
from lora_cli.checkpoint.staged import StagedFile
from lora_cli.checkpoint.staging import Staging, check_apart, check_space
from lora_cli.errors import WriteError
from lora_cli.progress import SILENT, Progress
from lora_cli.surgery.budget import Budget
from lora_cli.surgery.engine import Pieces, Wanted, Workshop, none, raw_bytes
from lora_cli.surgery.plan import OutputFile, Plan
from lora_cli.surgery.receipt import ours_beside
from lora_cli.surgery.units import Unit, units_of
from lora_cli.surgery.workers import run_units


class Tap(Protocol):
    """Watches the pieces of a unit as they pass, in the worker's process, and is told in ours what it found."""

    def watch(self, unit: Unit, pieces: Pieces, found: list[Any]) -> Pieces:
        """Pass pieces on; append to `found` what is to be known of the unit."""
        ...

    def take(self, unit: Unit, found: Any) -> None:
        """Keep what was found in a unit."""
        ...


Closing = Callable[[Staging], Iterable[SideFile]]
"""Writes what is only known when all tensors are there, and returns the small files that go in last."""


def execute(
    plan: Plan,
    out: Path,
    budget: Budget,
    *,
    taps: Callable[[Staging], Sequence[Tap]] = lambda _: (),
    deltas: Wanted = none,
    see_copies: bool = False,
    closing: Closing = lambda _: (),
    may_replace: Callable[[], bool] = lambda: False,
    progress: Progress = SILENT,
) -> int:
    """Write what the plan says to `out`: all of it, or nothing.

    Args:
        plan: What to write.
        out: A folder that is absent or empty, or a `.safetensors` file.
        budget: Threads and buffer sizes.
        taps: Given the staging, makes what watches the pieces.
        deltas: Which pieces carry deltas for the taps.
        see_copies: Whether tensors that are only copied pass the taps too.
        closing: Is called with all tensors written, and not yet published. The last file it returns is the receipt.
        may_replace: Says whether what stands at `out` may be replaced.
        progress: Hears of every unit.

    Returns:
        Bytes written.

    Raises:
        OutputExistsError: `out` exists, or is an input.
        DiskFullError: No space, before or during the work.
        WriteError: Anything else that kept a file from being written.
    """
    folder = out.suffix != ".safetensors"
    check_apart(out, plan.inputs)
    # What is recorded is gathered first, and then copied together.
    check_space(out, plan.bytes_to_write + (2 * plan.bytes_to_undo if see_copies else 0))
    with Staging(out, folder=folder, may_replace=may_replace).opened() as staging:
        names = [file.name if folder else out.name for file in plan.files]
        staged = [staging.create(name, file.size) for name, file in zip(names, plan.files, strict=True)]
        _fill(_Filler(plan, staged, taps(staging), deltas, see_copies=see_copies), budget, progress)
        # The index, and then the receipt, come last: without them a folder does not look complete.
        smalls = sorted(plan.side_files, key=lambda side: side.name.endswith(".index.json"))
        for side in [*smalls, *closing(staging)]:
            staging.write_small(side.name, side.read())
        written = staging.bytes_written
        outdated = [] if folder else set(ours_beside(out)).difference(staging.names)
        staging.publish(lambda: progress.published(str(out)), outdated)
    return written


def _fill(filler: _Filler, budget: Budget, progress: Progress) -> None:
    nbytes = sum(file.size for file in filler.plan.files)
    progress.begin(filler.plan.operation, nbytes)
    units = [unit for number, file in enumerate(filler.plan.files) for unit in filler.units(number, file)]
    left = Counter(unit.file for unit in units)
    # The disk is waited for beside the work, which goes on meanwhile.
    with ThreadPoolExecutor(1, thread_name_prefix="lora-cli") as sync:
        syncing: dict[Future[None], StagedFile] = {}
        for unit, found in run_units(
            units, filler.work, lambda: Workshop(budget.strip_bytes), budget.threads, nbytes=nbytes
        ):
            filler.take(unit, found)
            progress.advance(0 if _only_looks(unit) else unit.nbytes)
            sync.submit(filler.start_writing, unit)
            left[unit.file] -= 1
            if not left[unit.file]:
                syncing[sync.submit(filler.finish, unit.file)] = filler.staged[unit.file]
            _tell(syncing, [future for future in syncing if future.done()], progress)
        _tell(syncing, list(syncing), progress)


def _tell(syncing: dict[Future[None], StagedFile], done: list[Future[None]], progress: Progress) -> None:
    """Tell of files that are complete, or of the error that they came to."""
    for future in done:
        future.result()
        file = syncing.pop(future)
        progress.file_done(file.name, file.size)


class _Filler:
    """Does units, takes what was found in them, and finishes files."""

    def __init__(
        self, plan: Plan, staged: list[StagedFile], taps: Sequence[Tap], deltas: Wanted, *, see_copies: bool
    ) -> None:
        self.plan = plan
        self.staged = staged
        self._taps = taps
        self._deltas = deltas
        self._see_copies = see_copies
        self._crowds = crowds(2 * sum(file.size for file in plan.files))

    def units(self, number: int, file: OutputFile) -> list[Unit]:
        """The units of one file."""
        units = list(units_of(number, file, seen=self._see_copies))
        if not any(unit.edit is None and unit.begin == 0 for unit in units):
            units.insert(0, Unit(number, None, 0, file.header.data_start, None, 0, file.header.data_start))
        return units

    def work(self, unit: Unit, workshop: Workshop) -> list[list[Any]]:
        """Do one unit; returns what each tap found."""
        found: list[list[Any]] = [[] for _ in self._taps]
        file, staged = self.plan.files[unit.file], self.staged[unit.file]
        if unit.edit is not None:
            at = file.header.data_start + unit.edit.begin
            pieces = workshop.pieces(unit.edit, unit.begin, unit.end, deltas=self._deltas)
            for tap, finding in zip(self._taps, found, strict=True):
                pieces = tap.watch(unit, pieces, finding)
            # Closed at once when a write fails: what it holds open would stay so as long as the error is remembered.
            with contextlib.closing(pieces):
                for piece in pieces:
                    if not unit.edit.copies:
                        staged.write(at + piece.offset * piece.result.itemsize, raw_bytes(piece.result))
        elif unit.source is not None:
            with unit.source.open() as reader:
                staged.copy(reader, unit.source_offset, unit.begin, unit.nbytes)
        else:
            staged.write(0, file.header.prefix)
        if self._crowds:
            _forget(unit)
        return found

    def take(self, unit: Unit, found: list[list[Any]]) -> None:
        """Hand over to each tap what it found."""
        for tap, findings in zip(self._taps, found, strict=True):
            for finding in findings:
                tap.take(unit, finding)

    def start_writing(self, unit: Unit) -> None:
        """Let the disk begin with what a unit has written."""
        if _only_looks(unit):
            return
        begin = unit.begin
        if unit.edit is not None:
            stored, rows = unit.edit, max(1, unit.edit.matrix[0])
            begin = self.plan.files[unit.file].header.data_start + stored.begin + stored.nbytes * unit.begin // rows
        self.staged[unit.file].start_writing(begin, unit.nbytes)

    def finish(self, number: int) -> None:
        """Sync a file of which all units are done."""
        self.staged[number].finish(forget=self._crowds)
        _check_readable(self.staged[number], self.plan.files[number])


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


def _check_readable(staged: StagedFile, file: OutputFile) -> None:
    """Let the safetensors library open what was written: a second reader, which shares no code with ours."""
    with safe_open(staged.path, framework="numpy") as opened:
        if len(opened.keys()) != len(file.edits):
            raise WriteError("The output does not read back as it was planned", file=staged.name)
