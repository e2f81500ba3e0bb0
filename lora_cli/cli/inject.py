"""`lora-cli inject`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lora_cli.cli import options as opt
from lora_cli.cli.draw import facts, line
from lora_cli.cli.output import Output
from lora_cli.cli.text import count, duration, number, size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_cli.surgery.inject import InjectResult
    from lora_cli.surgery.residual import Residual

_INIT = "How the factors begin"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    opt.command(app, "inject", "lora-cli inject base/ -o fresh/ --rank 16 --target attention")(inject)


def inject(
    output: Output,
    base: Annotated[str, typer.Argument(metavar="BASE", help="Checkpoint: file, folder or Hub id.")],
    out: opt.OutOption = "",
    rank: Annotated[int | None, typer.Option("--rank", metavar="R", help="Rank of the factors.")] = None,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", metavar="A", help="The scale is alpha / rank.", show_default="the rank"),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="PATTERN",
            help="all-linear (default), attention, mlp, a glob on dotted names, re:REGEX, or a YAML file. Repeat.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="Modules to leave out. Repeat.")
    ] = None,
    layout: Annotated[
        Literal["adapter", "wrapped"] | None,
        typer.Option(
            "--layout", help="A PEFT folder (default), or the whole checkpoint with factors beside its weights."
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            metavar="INIT",
            help="kaiming, gaussian or orthogonal for A, with B zero; or both from the weights: pissa, pissa_niter_N "
            "(quick), olora.",
            show_default="kaiming",
            rich_help_panel=_INIT,
        ),
    ] = None,
    base_out: Annotated[
        str,
        typer.Option(
            "--base-out",
            metavar="RESIDUAL",
            help="What pissa and olora leave of the base: the checkpoint to train and merge with.",
            show_default=False,
            rich_help_panel=_INIT,
        ),
    ] = "",
    std: Annotated[
        float | None,
        typer.Option("--std", metavar="STD", help="Spread of gaussian.", show_default="0.01", rich_help_panel=_INIT),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Decides A.", show_default="0", rich_help_panel=_INIT)
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option("--dtype", help="Type of the factors.", show_default="fp32", rich_help_panel=_INIT),
    ] = None,
    rslora: Annotated[
        bool, typer.Option("--rslora", help="Scale by alpha / √rank instead.", rich_help_panel=_INIT)
    ] = False,
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="YAML file with these fields; options here win.")
    ] = None,
    dry: opt.DryRunOption = False,
    force: opt.ForceOption = False,
    resume: opt.ResumeOption = False,
    threads: opt.ThreadsOption = None,
    memory: opt.MemoryOption = None,
) -> None:
    """Make a fresh adapter for a checkpoint.

    With kaiming, gaussian and orthogonal it changes nothing, merged as it is: B is zero. One seed gives the same bytes
    on every machine.

    pissa and olora take the factors from the weights and write what is left of these to --base-out. The adapter fits
    that checkpoint alone: merged into it as it is, it gives BASE within one rounding. Its receipt lets merge, verify
    and inspect --base refuse BASE; an adapter that another tool saved has no receipt, and cannot be told. Each thread
    has one weight in float64 in memory, pissa some eight times as much.
    """
    from lora_cli.cli.planned import DryRun, dry_run
    from lora_cli.surgery import inject as surgery
    from lora_cli.surgery.inject_options import settle_options

    given = {
        "rank": rank,
        "alpha": alpha,
        "targets": tuple(target or ()),
        "exclude": tuple(exclude or ()),
        "layout": layout,
        "init": init,
        "std": std,
        "seed": seed,
        "dtype": dtype,
        "rslora": rslora or None,
    }
    options = settle_options(Path(config) if config else None, given)
    budget = opt.memory_bytes(memory)
    if dry:
        injection = surgery.prepare(base, options, progress=output.progress())
        plan = injection.plan().for_output(Path(out))
        left = surgery.residual_base(injection, Path(out), base_out)
        if out:
            surgery.check_injection_output(plan, Path(out), left, options, force=force)
        residual = DryRun(left.planned(plan), base_out, threads, budget) if left else None
        planned = DryRun(plan, out, threads, budget, residual=residual)
        output.result(planned, "plan", lambda: dry_run(planned))
        return
    result = surgery.inject(
        base,
        out,
        base_out=base_out,
        **options.arguments(),
        force=force,
        resume=resume,
        threads=threads,
        memory=budget,
        progress=output.progress(),
    )
    output.result(result, "inject", lambda: view(result))


def view(result: InjectResult) -> Iterator[RenderableType]:
    """What an injection wrote, for people."""
    yield line(("injected ", "bold green"), (result.out, "bold"), f" ({result.layout})")
    shapes: dict[str, int] = {}
    for module in result.modules:
        name = module.key.removesuffix(".weight").rpartition(".")[2]
        shapes[name] = shapes.get(name, 0) + 1
    yield facts(
        [
            ("modules", f"{len(result.modules):,}: " + ", ".join(f"{name} ({n})" for name, n in shapes.items())),
            ("rank", f"{result.rank}, alpha {number(result.alpha)}"),
            ("trainable", f"{result.parameters:,} parameters, {result.trainable_fraction:.2%} of all"),
            ("written", f"{size(result.bytes_written)} in {count(len(result.files), 'file')}"),
            *([("base", _residual_words(result.residual))] if result.residual else []),
            ("took", f"{duration(result.seconds)}, peak memory {size(result.peak_rss_bytes)}"),
        ]
    )


def _residual_words(residual: Residual) -> str:
    """Where the changed base is, and that it is the one that counts."""
    written = f"{size(residual.bytes_written)} in {count(len(residual.files), 'file')}"
    return f"train and merge with {residual.out}, not with the original ({written})"
