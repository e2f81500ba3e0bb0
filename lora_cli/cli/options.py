"""Options that several commands share, and the decorator that makes a function a command."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lora_cli.cli.output import Output
from lora_cli.cli.text import parse_size
from lora_cli.errors import UsageError

if TYPE_CHECKING:
    from lora_cli.adapters.source import ReadOptions

GLOBAL = Output()
"""What was said before the command's name."""

CURRENT: list[Output] = [GLOBAL]
"""The output of the command that runs, for `main` to show its error in the same way."""

_SHOWN = "How it is shown"

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout, also on failure.", rich_help_panel=_SHOWN)
]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.", rich_help_panel=_SHOWN)]
VerboseOption = Annotated[
    bool, typer.Option("-v", "--verbose", help="A line per file instead of a progress bar.", rich_help_panel=_SHOWN)
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Print a traceback with an error.", rich_help_panel=_SHOWN)]

_COMMON = {"json_": JsonOption, "quiet": QuietOption, "verbose": VerboseOption, "debug": DebugOption}

_NAMES = "When names or files need help"
_RUN = "How it runs"

OutOption = Annotated[
    str,
    typer.Option(
        "-o", "--out", metavar="OUT", help="Folder (absent or empty), or a .safetensors file for one-file bases."
    ),
]
WeightOption = Annotated[
    list[float] | None,
    typer.Option("--weight", metavar="W", help="Strength, once per adapter in their order.", show_default="1"),
]
AlphaOption = Annotated[
    float | None,
    typer.Option("--alpha", metavar="A", help="Alpha for all adapters, whatever they say; the scale is alpha / rank."),
]
ScaleOption = Annotated[
    float | None, typer.Option("--scale", metavar="S", help="The scale itself, instead of alpha / rank.")
]
DtypeOption = Annotated[
    Literal["keep", "bf16", "fp16", "fp32"], typer.Option("--dtype", help="Floating type of the output.")
]
MapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--map", metavar="OLD=NEW", help="The adapter's module OLD is the base's NEW. Repeat.", rich_help_panel=_NAMES
    ),
]
UnmappedOption = Annotated[
    bool,
    typer.Option("--allow-unmapped", help="Leave out adapter tensors that match nothing.", rich_help_panel=_NAMES),
]
OrientationOption = Annotated[
    Literal["ba", "ab"] | None,
    typer.Option(
        "--orientation",
        help="How square matrices of the base are stored: ba for (out × in), ab for (in × out).",
        rich_help_panel=_NAMES,
    ),
]
IgnoreFieldOption = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-field",
        metavar="NAME",
        help="Config field that is set and may be ignored. Repeat.",
        rich_help_panel=_NAMES,
    ),
]
ExpertLayoutOption = Annotated[
    str | None,
    typer.Option(
        "--expert-layout",
        metavar="WORDS",
        help="How factors of experts lie, where files do not say it: A meets the rows or the columns of each expert's "
        "matrix, in B the expert is fastest (PEFT) or slowest (Unsloth before September 2026). One word of each, such "
        "as columns, slowest or rows-slowest.",
        rich_help_panel=_NAMES,
    ),
]
InitialOption = Annotated[
    list[str] | None,
    typer.Option(
        "--initial",
        metavar="ADAPTER",
        help="The adapter as it was before training, where its init changed the base (PiSSA, OLoRA, CorDA, LoRA-GA). "
        "Repeat, in their order.",
        rich_help_panel=_NAMES,
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace OUT where lora-cli itself wrote all of it.")]
ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on where the same run was cut off, file by file, and keep finished files if this one is too.",
    ),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads", metavar="N", min=1, help="Units of work at once.", show_default="all cores", rich_help_panel=_RUN
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory", metavar="SIZE", help="Bound on buffers in flight.", show_default="256MiB", rich_help_panel=_RUN
    ),
]


def command(app: typer.Typer, name: str, example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function `f(output, …)` as a command, with the common options and an example in its help."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(**given: Any) -> None:
            said = {option: given.pop(option) for option in _COMMON}
            output = Output(
                json=said["json_"] or GLOBAL.json,
                quiet=said["quiet"] or GLOBAL.quiet,
                verbose=said["verbose"] or GLOBAL.verbose,
                debug=said["debug"] or GLOBAL.debug,
            )
            CURRENT[0] = output
            function(output, **given)

        signature = inspect.signature(function, eval_str=True)
        own = [parameter for parameter in signature.parameters.values() if parameter.name != "output"]
        common = [
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
            for option, annotation in _COMMON.items()
        ]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        # Typer reads a command's options from its signature.
        vars(run)["__signature__"] = signature.replace(parameters=[*parameters, *common])
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *common]}
        app.command(name, help=_paragraphs(function.__doc__ or ""), epilog=f"Example:\n\n  {example}")(run)
        return function

    return register


def _paragraphs(doc: str) -> str:
    """A docstring with one line per paragraph: the terminal breaks lines where it likes."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(doc).split("\n\n"))


def read_options(
    alpha: float | None,
    scale: float | None,
    ignore_field: list[str] | None = None,
    initial: list[str] | None = None,
    expert_layout: str | None = None,
) -> ReadOptions:
    """Check and collect what the user says about reading adapters.

    Raises:
        UsageError: Both a scale and an alpha, one that is no finite number, or words that are none.
    """
    from lora_cli.adapters.expert_layout import ExpertLayout
    from lora_cli.adapters.source import ReadOptions

    if alpha is not None and scale is not None:
        raise UsageError("--alpha and --scale exclude each other", hint="give one of them")
    for name, value in (("--alpha", alpha), ("--scale", scale)):
        if value is not None and not math.isfinite(value):
            raise UsageError(f"{name} must be a finite number", found=value)
    layout = ExpertLayout() if expert_layout is None else ExpertLayout.parse(expert_layout)
    return ReadOptions(alpha, scale, tuple(ignore_field or ()), tuple(initial or ()), layout)


def memory_bytes(text: str | None) -> int | None:
    """Parse `--memory`; None when it was not given.

    Raises:
        UsageError: It is no size.
    """
    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise UsageError(f"--memory is no size: {error}", found=text, expected="such as 256MiB or 1GB") from error
