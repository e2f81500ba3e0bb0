"""`lora-cli diff`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.cli import options as opt
from lora_cli.cli.draw import facts, grid, line
from lora_cli.cli.output import Output
from lora_cli.cli.text import count, duration, few, number, size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_cli.surgery.changes import Changed
    from lora_cli.surgery.diff import DiffResult

ROWS = 30
"""Tensors that are listed for people; JSON has all of them."""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    opt.command(app, "diff", "lora-cli diff base/ merged/ --rank")(diff)


def diff(
    output: Output,
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint or an adapter: file, folder or Hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another of the same kind.")],
    tolerance: Annotated[
        float, typer.Option("--tolerance", metavar="T", help="Tensors whose elements differ by at most T are the same.")
    ] = 0.0,
    only: Annotated[
        str | None, typer.Option("--only", metavar="PATTERN", help="Compare what this glob, or re:REGEX, finds.")
    ] = None,
    rank: Annotated[bool, typer.Option("--rank", help="Is the change low-rank, and of which rank?")] = False,
    alpha: opt.AlphaOption = None,
    scale: opt.ScaleOption = None,
    ignore_field: opt.IgnoreFieldOption = None,
    expert_layout: opt.ExpertLayoutOption = None,
    threads: opt.ThreadsOption = None,
    memory: opt.MemoryOption = None,
) -> None:
    """Compare two checkpoints tensor by tensor, or two adapters: LoRA by deltas, others by tensors.

    Exit code 0 if they are the same, 1 if they differ. Two adapters are the same when their deltas are, whatever their
    factors look like.
    """
    from lora_cli.surgery import diff as surgery

    result = surgery.diff(
        a,
        b,
        tolerance=tolerance,
        only=only,
        rank=rank,
        threads=threads,
        memory=opt.memory_bytes(memory),
        options=opt.read_options(alpha, scale, ignore_field, expert_layout=expert_layout),
        progress=output.progress(),
    )
    output.result(result, "diff", lambda: view(result, ranked=rank))
    if not result.same:
        raise typer.Exit(1)


def view(result: DiffResult, *, ranked: bool) -> Iterator[RenderableType]:
    """What a comparison found, for people: a summary, then the changes by size."""
    noun = result.names
    if result.same:
        yield line(("same ", "bold green"), f"{count(result.unchanged, noun)} compared")
    else:
        parts = [f"{len(result.changed):,} changed", f"{result.unchanged:,} unchanged"]
        parts += [f"{len(result.only_in_a):,} only in {result.a}"] if result.only_in_a else []
        parts += [f"{len(result.only_in_b):,} only in {result.b}"] if result.only_in_b else []
        yield line(("differ ", "bold red"), ", ".join(parts))
    if result.changed:
        heads = [noun, "max abs", "relative", "elements", *(["rank", "energy"] if ranked else [])]
        yield grid(heads, [_row(change)[: len(heads)] for change in result.changed[:ROWS]], right=range(1, len(heads)))
        if len(result.changed) > ROWS:
            yield line(f"… and {len(result.changed) - ROWS} smaller ones (--json lists all)", style="dim")
    if ranked and any(change.rank is None and change.what in ("values", "dtype") for change in result.changed):
        yield facts([("rank", "only of matrices that hold floating numbers, and of changes by factors; else blank")])
    yield facts([*_only(result.a, result.only_in_a), *_only(result.b, result.only_in_b)])
    yield facts([("took", f"{duration(result.seconds)}, peak memory {size(result.peak_rss_bytes)}")])


def _row(change: Changed) -> list[object]:
    what = change.key if change.what == "values" else f"{change.key}: {change.what} {change.before} → {change.after}"
    what += f", {count(change.equal_rows, 'row')} equal" if change.equal_rows is not None else ""
    return [
        what,
        _number(change.max_abs),
        _number(change.relative_norm),
        None if change.changed_fraction is None else f"{change.changed_fraction:.1%}",
        change.rank,
        None if change.energy is None else f"{change.energy:.1%}",
    ]


def _number(value: float | None) -> str | None:
    return None if value is None else number(float(f"{value:.3g}"))


def _only(label: str, names: tuple[str, ...]) -> Iterator[tuple[str, object]]:
    if names:
        yield f"only in {label}", few(names)
