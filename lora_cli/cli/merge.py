"""`lora-cli merge`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lora_cli.cli import options as opt
from lora_cli.cli.draw import facts, line
from lora_cli.cli.output import Output
from lora_cli.cli.text import count, duration, size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_cli.surgery.merge import MergeResult

TokenizerOption = Annotated[
    Literal["base", "adapter"],
    typer.Option("--tokenizer", help="Whose tokenizer files to write, where they differ."),
]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    opt.command(app, "merge", "lora-cli merge base/ adapter/ -o merged/ --weight 0.8")(merge)


def merge(
    output: Output,
    base: Annotated[str, typer.Argument(metavar="BASE", help="Checkpoint: file, folder or Hub id.")],
    adapters: Annotated[
        list[str] | None, typer.Argument(metavar="ADAPTER", help="Adapters: PEFT folders, factor files, Hub ids.")
    ] = None,
    out: opt.OutOption = "",
    weight: opt.WeightOption = None,
    alpha: opt.AlphaOption = None,
    scale: opt.ScaleOption = None,
    dtype: opt.DtypeOption = "keep",
    undo: Annotated[
        bool, typer.Option("--undo/--no-undo", help="Write the undo file, which brings the base back bit for bit.")
    ] = True,
    embed_adapter: Annotated[
        bool, typer.Option("--embed-adapter", help="Put the factors into the undo file: unmerge needs nothing else.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Apply an adapter that the base's receipt says is in it already.")
    ] = False,
    dry: opt.DryRunOption = False,
    force: opt.ForceOption = False,
    resume: opt.ResumeOption = False,
    map_: opt.MapOption = None,
    allow_unmapped: opt.UnmappedOption = False,
    orientation: opt.OrientationOption = None,
    ignore_field: opt.IgnoreFieldOption = None,
    expert_layout: opt.ExpertLayoutOption = None,
    initial: opt.InitialOption = None,
    tokenizer: TokenizerOption = "base",
    threads: opt.ThreadsOption = None,
    memory: opt.MemoryOption = None,
) -> None:
    """Apply adapters to a checkpoint.

    Every adapter tensor is applied or the merge is refused; tensors that no adapter changes keep their bytes. The
    result is the same on every machine; docs/tuners.md names the few tuners for which it need not be. BASE may be a
    wrapped checkpoint that carries its own factors (see inject).
    """
    from lora_cli.cli.planned import DryRun, Undo, dry_run, summary
    from lora_cli.surgery import merge as surgery
    from lora_cli.surgery.placing import PlanOptions

    options = PlanOptions(
        weights=tuple(weight or ()),
        dtype=dtype,
        maps=tuple(map_ or ()),
        allow_unmapped=allow_unmapped,
        tokenizer=tokenizer,
        orientation=orientation,
        read=opt.read_options(alpha, scale, ignore_field, initial, expert_layout),
    )
    budget = opt.memory_bytes(memory)
    if dry:
        plan = surgery.plan_merge(
            base, adapters or (), options, out=out, undo=undo, again=again, progress=output.progress()
        )
        if out:
            surgery.check_output(plan, Path(out), force=force)
        kept: Undo = "with adapter" if embed_adapter else "alone"
        planned = DryRun(plan, out, threads, budget, kept if undo else None)
        output.result(planned, "plan", lambda: dry_run(planned))
        return
    result = surgery.merge(
        base,
        adapters or (),
        out,
        options,
        undo=undo,
        embed_adapter=embed_adapter,
        again=again,
        force=force,
        resume=resume,
        threads=threads,
        memory=budget,
        progress=output.progress(),
        on_plan=lambda plan: output.show(summary(plan, undo=undo)),
    )
    output.result(result, "merge", lambda: view(result))


def view(result: MergeResult) -> Iterator[RenderableType]:
    """What a merge did, for people."""
    from lora_cli.cli import effects
    from lora_cli.cli.planned import layout_rows, ledger_words, survival_words, use_words

    tensors = result.tensors
    parts = [f"{tensors[name]:,} {name}" for name in ("edited", "copied", "added", "dropped") if tensors[name]]
    yield line(("merged ", "bold green"), (result.out, "bold"))
    yield facts(
        [
            ("tensors", ", ".join(parts)),
            *(("adapter", use_words(use)) for use in result.adapters),
            *(layout_rows(result.adapters)),
            ("ledger", ledger_words(result.ledger)),
            *(effects.rows(result.effects)),
            ("survival", survival_words(result.survival)),
            ("written", f"{size(result.bytes_written)} in {count(len(result.files), 'file')}"),
            ("took", f"{duration(result.seconds)}, peak memory {size(result.peak_rss_bytes)}"),
            ("undo", undo_words(result)),
        ]
    )


def undo_words(result: MergeResult) -> str:
    """What the files beside the tensors are for."""
    receipt = result.files[-1]
    if result.undo is None:
        return f"not possible (--no-undo); {receipt} says what went in"
    amount = size(result.undo.bytes)
    return f"{result.undo.path} ({amount}) brings the base back bit for bit, {receipt} says what went in: keep both"
