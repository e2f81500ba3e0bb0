"""`lora-cli verify`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.cli import options as opt
from lora_cli.cli.draw import facts, grid, line
from lora_cli.cli.output import Output
from lora_cli.cli.text import count, duration, size, ulps

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_cli.surgery.verify import Difference, VerifyResult

ROWS = 30
"""Tensors that are listed for people; JSON has all of them."""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    opt.command(app, "verify", "lora-cli verify merged/ --base base/ --adapter adapter/")(verify)


def verify(
    output: Output,
    merged: Annotated[str, typer.Argument(metavar="MERGED", help="The checkpoint in question.")],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="BASE", help="What it is said to be made from. --roundtrip can do without."),
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="ADAPTER", help="What is said to be in it. Repeat.")
    ] = None,
    weight: opt.WeightOption = None,
    alpha: opt.AlphaOption = None,
    scale: opt.ScaleOption = None,
    dtype: opt.DtypeOption = "keep",
    roundtrip: Annotated[
        bool,
        typer.Option(
            "--roundtrip", help="Also unmerge in memory: compare with the base, or with the digests in the undo file."
        ),
    ] = False,
    undo: Annotated[
        str | None, typer.Option("--undo", metavar="FILE", help="The undo file, where it is not beside MERGED.")
    ] = None,
    max_ulp: Annotated[
        int,
        typer.Option("--max-ulp", metavar="N", min=0, help="Units in the last place that an edited weight may be off."),
    ] = 0,
    junit: Annotated[
        str | None, typer.Option("--junit", metavar="FILE", help="Write the outcome as JUnit XML too, for CI.")
    ] = None,
    map_: opt.MapOption = None,
    allow_unmapped: opt.UnmappedOption = False,
    orientation: opt.OrientationOption = None,
    ignore_field: opt.IgnoreFieldOption = None,
    expert_layout: opt.ExpertLayoutOption = None,
    initial: opt.InitialOption = None,
    threads: opt.ThreadsOption = None,
    memory: opt.MemoryOption = None,
) -> None:
    """Say whether a checkpoint is exactly base + adapters; writes no checkpoint.

    Exit code 0 if it is, 1 if not; what differs is named, with what it looks like: the bare base, another scale,
    applied twice, another adapter. A checkpoint made by another tool rounds differently: give it --max-ulp 1.

    With --roundtrip it is also unmerged in memory with its undo file, which has the digests of the base.
    """
    from lora_cli.cli.junit import Report
    from lora_cli.surgery import verify as surgery
    from lora_cli.surgery.placing import PlanOptions

    adapters = adapter or []
    inputs = [("merged", merged), *([("base", base)] if base else []), *(("adapter", name) for name in adapters)]
    report = Report(junit, inputs)
    with report.watching():
        result = surgery.verify(
            merged,
            base,
            adapters,
            PlanOptions(
                weights=tuple(weight or ()),
                dtype=dtype,
                maps=tuple(map_ or ()),
                allow_unmapped=allow_unmapped,
                orientation=orientation,
                read=opt.read_options(alpha, scale, ignore_field, initial, expert_layout),
            ),
            roundtrip=roundtrip,
            undo=undo,
            max_ulp=max_ulp,
            threads=threads,
            memory=opt.memory_bytes(memory),
            progress=output.progress(),
        )
    report.write(result)
    output.result(result, "verify", lambda: view(result))
    if not result.verified:
        raise typer.Exit(1)


def view(result: VerifyResult) -> Iterator[RenderableType]:
    """What a verification found, for people."""
    from lora_cli.cli.planned import layout_rows, use_words

    checked, different = result.tensors["checked"], result.tensors["different"]
    allowed = "byte for byte" if result.max_ulp == 0 else f"within {result.max_ulp} ULP"
    if result.verified:
        yield line(("verified ", "bold green"), f"{count(checked, 'tensor')} {allowed}")
    else:
        listed = len(result.different)
        every = checked + sum(one.what not in ("values", "roundtrip", "config") for one in result.different)
        config = ", and config.json" if listed > different else ""
        yield line(("differs ", "bold red"), f"{count(different, 'tensor')} of {every}, compared {allowed}{config}")
        if result.looks_like:
            yield line(result.looks_like)
        # What all have in common is not said of each of them.
        common = result.looks_like and all(difference.what == "values" for difference in result.different)
        heads = ("tensor", "what", "elements", "max ULP", "strength", *([] if common else ["looks like"]))
        yield grid(heads, [_row(d)[: len(heads)] for d in result.different[:ROWS]], right=(2, 3, 4))
        if listed > ROWS:
            yield line(f"… and {listed - ROWS} more (--json lists all)", style="dim")
    yield facts(
        [
            ("round trip", _trip_words(result)),
            *(("adapter", use_words(use)) for use in result.adapters),
            *(layout_rows(result.adapters)),
            ("strength", _strength_words(result)),
            ("took", f"{duration(result.seconds)}, peak memory {size(result.peak_rss_bytes)}"),
        ]
    )


def _row(difference: Difference) -> list[object]:
    what = difference.what
    if difference.found is not None:
        what += f" {difference.found}, not {difference.expected}"
    strength = None if difference.strength is None else f"{difference.strength:.3g}"
    ulp = None if difference.max_ulp is None else ulps(difference.max_ulp)
    return [difference.key, what, difference.elements, ulp, strength, difference.looks_like]


def _trip_words(result: VerifyResult) -> str | None:
    trip = result.roundtrip
    if trip is None:
        return None
    against = "the base" if trip.against == "base" else f"the digests of {result.base} in the undo file"
    if trip.exact:
        return f"unmerged in memory, {count(len(trip.files), 'file')} bit for bit as {against}"
    if not trip.different:
        return "not possible"
    return f"unmerged in memory, {count(trip.different, 'tensor or file')} not as {against}"


def _strength_words(result: VerifyResult) -> str:
    """What of the deltas is in the tensors that are as they should be: the least of all, and what is usual.

    A tensor that differs may have much of a change in it that is not the adapter's: the table has its strength.
    """
    from statistics import median

    wrong = {difference.key for difference in result.different}
    right = (one.strength for one in result.survival if one.key not in wrong)
    strengths = [strength for strength in right if strength is not None and math.isfinite(strength)]
    if not strengths:
        return ""
    least, usual = f"{min(strengths):.2f}", f"{median(strengths):.2f}"
    words = least if least == usual else f"{least} or more, {usual} usually"
    return f"{words} ({count(len(strengths), 'tensor')})"
