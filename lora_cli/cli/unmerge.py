"""`lora-cli unmerge`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.cli import options as opt
from lora_cli.cli.draw import facts, grid, line
from lora_cli.cli.output import Output
from lora_cli.cli.text import count, duration, size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_cli.surgery.unmerge import UnmergeResult

NOT_PROVED = "some weights contradict that lora-cli merged this adapter at this weight; the rest supposes it"

ROWS = 12
"""Tensors that are listed for people; JSON has all of them."""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    opt.command(app, "unmerge", "lora-cli unmerge merged/ adapter/ -o base/")(unmerge)


def unmerge(
    output: Output,
    merged: Annotated[str, typer.Argument(metavar="MERGED", help="The merged checkpoint.")],
    adapters: Annotated[
        list[str] | None, typer.Argument(metavar="ADAPTER", help="The adapters that were merged into it.")
    ] = None,
    out: opt.OutOption = "",
    undo: Annotated[
        str | None, typer.Option("--undo", metavar="FILE", help="The undo file, where it is not beside MERGED.")
    ] = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Without an undo file: subtract, prove what can be, count the rest.")
    ] = False,
    weight: opt.WeightOption = None,
    alpha: opt.AlphaOption = None,
    scale: opt.ScaleOption = None,
    dry: opt.DryRunOption = False,
    force: opt.ForceOption = False,
    resume: opt.ResumeOption = False,
    map_: opt.MapOption = None,
    allow_unmapped: opt.UnmappedOption = False,
    orientation: opt.OrientationOption = None,
    ignore_field: opt.IgnoreFieldOption = None,
    expert_layout: opt.ExpertLayoutOption = None,
    initial: opt.InitialOption = None,
    threads: opt.ThreadsOption = None,
    memory: opt.MemoryOption = None,
) -> None:
    """Take adapters out of a merged checkpoint again.

    The undo file of the merge brings the base back bit for bit, and every digest is compared before anything is
    published. Of stacked merges the last one comes off. ADAPTER is needed unless it was embedded.

    Without an undo file --approximate subtracts the adapter: most weights are proved to be the base's own, and the
    others are counted, tensor by tensor. Name the adapters and weights of the merge.
    """
    from lora_cli.cli.planned import DryRun, dry_run, summary
    from lora_cli.surgery import unmerge as surgery
    from lora_cli.surgery.merge import check_output
    from lora_cli.surgery.placing import PlanOptions

    options = PlanOptions(
        weights=tuple(weight or ()),
        maps=tuple(map_ or ()),
        allow_unmapped=allow_unmapped,
        orientation=orientation,
        read=opt.read_options(alpha, scale, ignore_field, initial, expert_layout),
    )
    budget = opt.memory_bytes(memory)
    if dry:
        plan = surgery.plan_unmerge(
            merged, adapters or (), options, undo=undo, approximate=approximate, progress=output.progress()
        )
        plan = plan.for_output(Path(out))
        if out:
            check_output(plan, Path(out), force=force)
        planned = DryRun(plan, out, threads, budget)
        output.result(planned, "plan", lambda: dry_run(planned))
        return
    result = surgery.unmerge(
        merged,
        adapters or (),
        out,
        options,
        undo=undo,
        approximate=approximate,
        force=force,
        resume=resume,
        threads=threads,
        memory=budget,
        progress=output.progress(),
        on_plan=lambda plan: output.show(summary(plan)),
    )
    output.result(result, "unmerge", lambda: view(result))


def view(result: UnmergeResult) -> Iterator[RenderableType]:
    """What an unmerge did, for people."""
    proved = sum(file.digest is not None for file in result.files)
    whole = "bit for bit" if proved else "every weight proved"
    how = whole if result.exact else "tensors bit for bit, other files not" if proved else "approximate"
    yield line(("unmerged ", "bold green"), (result.out, "bold"), f" ({how})")
    total = sum(tensor.elements for tensor in result.undecided)
    exact = sum(tensor.exact for tensor in result.undecided)
    if total:
        words = f"{exact / total:.2%} of the weights in {count(len(result.undecided), 'edited tensor')}"
        yield facts([("proved", words) if result.proved else ("not proved", NOT_PROVED)])
        worst = sorted(result.undecided, key=lambda tensor: tensor.exact / tensor.elements)[:ROWS]
        rows = [
            (t.key, f"{t.exact / t.elements:.2%}", f"{t.undecided:,}", f"{t.impossible:,}" if t.impossible else "")
            for t in worst
        ]
        heads = ("tensor", "proved" if result.proved else "one candidate", "may differ", "impossible")
        yield grid(heads, rows, right=(1, 2, 3))
        if len(result.undecided) > ROWS:
            yield line(f"… and {len(result.undecided) - ROWS} better ones (--json lists all)", style="dim")
    yield facts(
        [
            ("kept", ", ".join(result.kept)),
            ("digests", f"{count(proved, 'file')} as before the merge" if proved else None),
            ("written", f"{size(result.bytes_written)} in {count(len(result.files), 'file')}"),
            ("took", f"{duration(result.seconds)}, peak memory {size(result.peak_rss_bytes)}"),
        ]
    )
