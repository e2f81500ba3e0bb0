"""Executing a plan: staged files, filled by the engine, published together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from lora_cli.checkpoint.leftovers import with_leftovers
from lora_cli.checkpoint.sidefiles import SideFile
from lora_cli.checkpoint.staging import Staging
from lora_cli.checkpoint.targets import check_apart, check_space
from lora_cli.errors import DiskFullError
from lora_cli.progress import SILENT, Progress
from lora_cli.surgery.budget import Budget
from lora_cli.surgery.filling import Filler, Tap
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.receipt import ours_beside
from lora_cli.surgery.repacking import in_order
from lora_cli.surgery.resuming import Request, prepare, told_of_kept

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
    request: Request | None = None,
    progress: Progress = SILENT,
) -> int:
    """Write what the plan says to `out`: all of it, or nothing.

    Args:
        plan: What to write.
        out: A folder that is absent or empty, or a `.safetensors` file.
        budget: Threads and buffer sizes.
        taps: Given the staging, makes what watches the pieces. Is called with torch there.
        see_copies: Whether tensors that are only copied pass the taps too.
        closing: Is called with all tensors written, and not yet published. The last file it returns is the receipt.
        may_replace: Says whether what stands at `out` may be replaced.
        request: What was asked for, as far as the plan does not say it, and whether to go on with a run that was cut
            off; without it no other run can go on with this one.
        progress: Hears of every unit.

    Returns:
        Bytes written.

    Raises:
        OutputExistsError: `out` exists, or is an input.
        DiskFullError: No space, before or during the work.
        WriteError: Anything else that kept a file from being written.
        LockedError: Another run writes to `out`.
        WrongInputError: A run that was cut off is to be gone on with, and was asked for something else.
    """
    staged = staging_of(
        plan,
        out,
        budget,
        taps=taps,
        see_copies=see_copies,
        closing=closing,
        may_replace=may_replace,
        request=request,
        progress=progress,
    )
    with staged as staging:
        written = staging.bytes_written
        publish(staging, lambda: progress.published(str(out)))
    return written


@contextlib.contextmanager
def staging_of(
    plan: Plan,
    out: Path,
    budget: Budget,
    *,
    taps: Callable[[Staging], Sequence[Tap]] = lambda _: (),
    see_copies: bool = False,
    closing: Closing = lambda _: (),
    may_replace: Callable[[], bool] = lambda: False,
    request: Request | None = None,
    progress: Progress = SILENT,
) -> Iterator[Staging]:
    """Write what the plan says beside `out`, complete and not yet published; leaving takes away what was not.

    Arguments and errors are those of `execute`.
    """
    folder = out.suffix != ".safetensors"
    check_apart(out, plan.inputs)
    # What is recorded is gathered first, and then copied together.
    recorded = 2 * plan.bytes_to_undo if see_copies else 0
    needed = plan.bytes_to_write + recorded + plan.bytes_to_reorder
    with Staging(out, folder=folder, may_replace=may_replace).opened() as staging, told_of_kept(staging, progress):
        resumption = prepare(staging, plan, request, progress)
        finished = resumption.finished
        try:
            check_space(out, needed - sum(plan.files[number].size for number in finished))
        except DiskFullError as error:
            with_leftovers(error, out, but=[staging.name])
            raise
        staged = [
            (staging.adopt if number in finished else staging.create)(file.name if folder else out.name, file.size)
            for number, file in enumerate(plan.files)
        ]
        with in_order(plan, staging.work) as ready:
            filler = Filler(ready, staged, see_copies=see_copies, resumption=resumption)
            filler.fill(lambda: taps(staging), budget, progress)
        # The index, and then the receipt, come last: without them a folder does not look complete.
        smalls = sorted(plan.side_files, key=lambda side: side.name.endswith(".index.json"))
        for side in [*smalls, *closing(staging)]:
            staging.write_small(side.name, side.read())
        yield staging


def publish(staging: Staging, done: Callable[[], None] = lambda: None) -> None:
    """Put a complete output in its place; see `Staging.publish`."""
    replaces = staging.replacing and not staging.folder
    outdated = set(ours_beside(staging.target)).difference(staging.names) if replaces else ()
    staging.publish(done, outdated)
