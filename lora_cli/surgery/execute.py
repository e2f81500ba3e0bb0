"""Executing a plan: staged files, filled by the engine, published together."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from safetensors import safe_open

from lora_cli.checkpoint.sidefiles import SideFile
from lora_cli.checkpoint.staged import StagedFile
from lora_cli.checkpoint.staging import Staging, check_apart, check_space
from lora_cli.errors import WriteError
from lora_cli.progress import SILENT, Progress
from lora_cli.surgery.budget import Budget
from lora_cli.surgery.engine import Pieces, Unit, Workshop, raw_bytes, units_of
from lora_cli.surgery.plan import OutputFile, Plan
from lora_cli.surgery.receipt import ours_beside
from lora_cli.surgery.workers import run_units

Tap = Callable[[Unit, Pieces], Pieces]
"""Watches the pieces of a unit as they pass."""

Closing = Callable[[Staging], Iterable[SideFile]]
"""Writes what is only known when all tensors are there, and returns the small files that go in last."""


def execute(
    plan: Plan,
    out: Path,
    budget: Budget,
    *,
    taps: Callable[[Staging], Sequence[Tap]] = lambda _: (),
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
        _fill(_Filler(plan, staged, taps(staging), see_copies=see_copies), budget, progress)
        # The index, and then the receipt, come last: without them a folder does not look complete.
        smalls = sorted(plan.side_files, key=lambda side: side.name.endswith(".index.json"))
        for side in [*smalls, *closing(staging)]:
            staging.write_small(side.name, side.read())
        written = staging.bytes_written
        outdated = [] if folder else set(ours_beside(out)).difference(staging.names)
        staging.publish(lambda: progress.published(str(out)), outdated)
    return written


def _fill(filler: _Filler, budget: Budget, progress: Progress) -> None:
    progress.begin(filler.plan.operation, sum(file.size for file in filler.plan.files))
    units = (unit for number, file in enumerate(filler.plan.files) for unit in filler.units(number, file))
    for unit, finished in run_units(units, filler.work, lambda: Workshop(budget.strip_bytes), budget.threads):
        progress.advance(unit.nbytes)
        if finished:
            progress.file_done(filler.staged[unit.file].name, filler.staged[unit.file].size)


class _Filler:
    """Does units, and finishes each file in the thread that does its last one."""

    def __init__(self, plan: Plan, staged: list[StagedFile], taps: Sequence[Tap], *, see_copies: bool) -> None:
        self.plan = plan
        self.staged = staged
        self._taps = taps
        self._see_copies = see_copies
        self._left: Counter[int] = Counter()
        self._lock = threading.Lock()

    def units(self, number: int, file: OutputFile) -> list[Unit]:
        """The units of one file; counted before any of them can be done."""
        header = Unit(number, None, 0, file.header.data_start, None, 0, file.header.data_start)
        units = [header, *units_of(number, file, seen=self._see_copies)]
        with self._lock:
            self._left[number] += len(units)
        return units

    def work(self, unit: Unit, workshop: Workshop) -> bool:
        """Do one unit; True if it was the last of its file."""
        file, staged = self.plan.files[unit.file], self.staged[unit.file]
        if unit.edit is not None:
            at = file.header.data_start + unit.edit.begin
            pieces = workshop.pieces(unit.edit, unit.begin, unit.end, deltas=bool(self._taps))
            for tap in self._taps:
                pieces = tap(unit, pieces)
            # Closed at once when a write fails: what it holds open would stay so as long as the error is remembered.
            with contextlib.closing(pieces):
                for piece in pieces:
                    staged.write(at + piece.offset * piece.result.itemsize, raw_bytes(piece.result))
        elif unit.source is not None:
            with unit.source.open() as reader:
                staged.copy(reader, unit.source_offset, unit.begin, unit.nbytes)
        else:
            staged.write(0, file.header.prefix)
        with self._lock:
            self._left[unit.file] -= 1
            last = self._left[unit.file] == 0
        if last:
            staged.finish()
            _check_readable(staged, file)
        return last


def _check_readable(staged: StagedFile, file: OutputFile) -> None:
    """Let the safetensors library open what was written: a second reader, which shares no code with ours."""
    with safe_open(staged.path, framework="numpy") as opened:
        if len(opened.keys()) != len(file.edits):
            raise WriteError("The output does not read back as it was planned", file=staged.name)
