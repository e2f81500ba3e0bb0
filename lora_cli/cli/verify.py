"""`lora-cli verify`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.cli import options as opt
from lora_cli.cli.draw import facts, grid, line
from lora_cli.cli.output import Output
from lora_cli.cli.text import count, duration, size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_cli.surgery.verify import VerifyResult

ROWS = 30
"""Tensors that are listed for people; JSON has all of them."""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    opt.command(app, "verify", "lora-cli verify merged/ --base base/ --adapter adapter/")(verify)


def verify(
    output: Output,
    merged: Annotated[str, typer.Argument(metavar="MERGED", help="The checkpoint in question.")],
    base: Annotated[str, typer.Option("--base", metavar="BASE", help="What it is said to be made from.")],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="ADAPTER", help="What is said to be in it. Repeat.")
    ] = None,
    weight: opt.WeightOption = None,
    alpha: opt.AlphaOption = None,
    scale: opt.ScaleOption = None,
    dtype: opt.DtypeOption = "keep",
    max_ulp: Annotated[
        int,
        typer.Option("--max-ulp", metavar="N", min=0, help="Units in the last place that an edited weight may be off."),
    ] = 0,
    map_: opt.MapOption = None,
    allow_unmapped: opt.UnmappedOption = False,
    orientation: opt.OrientationOption = None,
    ignore_field: opt.IgnoreFieldOption = None,
    threads: opt.ThreadsOption = None,
    memory: opt.MemoryOption = None,
) -> None:
    """Say whether a checkpoint is exactly base + adapters; writes nothing.

    Exit code 0 if it is, 1 if not. A checkpoint made by another tool rounds differently: give it --max-ulp 1.
    """
    from lora_cli.surgery import verify as surgery
    from lora_cli.surgery.placing import PlanOptions

    result = surgery.verify(
        merged,
        base,
        adapter or (),
        PlanOptions(
            weights=tuple(weight or ()),
            dtype=dtype,
            maps=tuple(map_ or ()),
            allow_unmapped=allow_unmapped,
            orientation=orientation,
            read=opt.read_options(alpha, scale, ignore_field),
        ),
        max_ulp=max_ulp,
        threads=threads,
        memory=opt.memory_bytes(memory),
        progress=output.progress(),
    )
    output.result(result, "verify", lambda: view(result))
    if not result.verified:
        raise typer.Exit(1)


def view(result: VerifyResult) -> Iterator[RenderableType]:
    """What a verification found, for people."""
    checked, different = result.tensors["checked"], result.tensors["different"]
    allowed = "byte for byte" if result.max_ulp == 0 else f"within {result.max_ulp} ULP"
    if result.verified:
        yield line(("verified ", "bold green"), f"{count(checked, 'tensor')} {allowed}")
    else:
        every = checked + sum(difference.what != "values" for difference in result.different)
        yield line(("differs ", "bold red"), f"{count(different, 'tensor')} of {every}, compared {allowed}")
        rows = [(d.key, d.what, d.elements, d.max_ulp, d.expected, d.found) for d in result.different[:ROWS]]
        yield grid(("tensor", "what", "elements", "max ULP", "expected", "found"), rows, right=(2, 3))
        if different > ROWS:
            yield line(f"… and {different - ROWS} more (--json lists all)", style="dim")
    yield facts([("took", f"{duration(result.seconds)}, peak memory {size(result.peak_rss_bytes)}")])
