"""The program `lora-cli`: its commands, its exit codes, and what happens when something goes wrong."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from lora_cli.cli import diff, inject, inspect, merge, unmerge, verify
from lora_cli.cli.options import CURRENT, GLOBAL, DebugOption, JsonOption, QuietOption, VerboseOption
from lora_cli.cli.output import ClosedPipe, Output
from lora_cli.cli.room import try_libraries_first
from lora_cli.cli.text import shown
from lora_cli.errors import Interrupted, LoraCliError, UsageError, WriteError
from lora_cli.version import __version__

HELP = """Checkpoint surgery for low-rank adapters: merge them into checkpoints, take them out, compare, inspect and
prepare them, on files.

BASE and MERGED are a .safetensors file, a folder, or a Hub id (owner/name, owner/name@revision).
ADAPTER is a PEFT folder, a .safetensors file of factors, or a Hub id."""

app = typer.Typer(
    name="lora-cli",
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example:\n\n  lora-cli merge base/ adapter/ -o merged/",
)
for module in (inspect, merge, verify, diff, unmerge, inject):
    module.register(app)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lora-cli {__version__}")
        raise typer.Exit


@app.callback()
def _before(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    json_: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    # The document that `--json` promises is due even when the rest of the line cannot be parsed.
    json_ = json_ or CURRENT[0].json
    GLOBAL.json, GLOBAL.quiet, GLOBAL.verbose, GLOBAL.debug = json_, quiet, verbose, debug
    CURRENT[0] = GLOBAL


def run(arguments: Sequence[str]) -> int:
    """Run the program with these arguments and return its exit code."""
    CURRENT[0] = Output(json=_wants_json(arguments))
    with _Stop() as stop:
        try:
            return _run(arguments, stop)
        except KeyboardInterrupt:  # while something else was being said
            return 128 + (stop.signal or signal.SIGINT)


def _run(arguments: Sequence[str], stop: _Stop) -> int:
    try:
        code = app(list(arguments) or ["--help"], prog_name="lora-cli", standalone_mode=False)
    except (ClosedPipe, SystemExit):  # Typer leaves by SystemExit when nobody reads its help
        _silence_stdout()
        return 141
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception as error:  # noqa: BLE001 (the last line of defence)
        if not stop.signal:  # else a library turned the interrupt into something of its own
            return _failed(_as_ours(error))
    if stop.signal:
        return _failed(Interrupted(stop.signal, CURRENT[0].written))
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the console script."""
    # A plan can be millions of values without a cycle: looking for one over and over takes a quarter of the time.
    gc.set_threshold(100_000, 20, 50)
    try_libraries_first()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (for the rest of the process)
        # Names from files may hold what the terminal's encoding lacks.
        getattr(sys, name).reconfigure(errors="backslashreplace")
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()
        code = code or 141
    except OSError as error:
        _silence_stdout()
        code = _failed(_as_ours(error))
    sys.exit(code)


class _Stop:
    """While entered, signals that ask a program to stop unwind it, so that nothing is left behind; the second kills."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            try:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup wants it ignored
                    self._before[number] = signal.signal(number, self)
            except ValueError:  # not the main thread: whoever runs us there handles signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt


def _failed(error: LoraCliError) -> int:
    try:
        CURRENT[0].error(error)
    except (ClosedPipe, OSError):
        # Nobody reads stdout, or it is full: a document cannot be shown there, but a line on stderr can.
        _silence_stdout()
        try:
            Output().error(error)
        except (ClosedPipe, OSError):
            say_plainly(error.message)
    return error.exit_code


def say_plainly(message: str) -> None:
    """Say what is wrong where nothing else works any more: no library is loaded, and nothing is laid out."""
    with contextlib.suppress(OSError, ValueError):
        os.write(2, f"error: {shown(message)}\n".encode("ascii", "backslashreplace"))


def _usage(error: typer.TyperException) -> UsageError:
    message = getattr(error, "format_message", lambda: str(error))()
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "lora-cli"
    return UsageError(message.strip().rstrip(".") or "No command given", hint=f"{path} --help")


def _as_ours(error: Exception) -> LoraCliError:
    """The error in our own words, whoever raised it."""
    if isinstance(error, LoraCliError):
        return error
    if isinstance(error, typer.TyperException):
        return _usage(error)
    if isinstance(error, OSError) and error.filename is None and not _lacks_memory(error):
        # Files are opened on the floors below, which raise errors of ours: this is stdout.
        return WriteError(f"The result cannot be shown: {error.strerror}")
    written = CURRENT[0].written
    outcome = f"{written} was complete by then" if written else "nothing was written"
    if _lacks_memory(error):
        wrapped = LoraCliError(
            f"{NO_MEMORY}; {outcome}", hint="allow it more, or try --threads 1 and a smaller --memory"
        )
    else:
        wrapped = LoraCliError(f"Internal error; {outcome}", found=f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


NO_MEMORY = "The system gave this process no more memory"
_REFUSED = ("allocate memory", "failed to map segment", "can't start new thread")
"""How libraries say that they got no memory: torch, the loader of shared libraries, Python."""


def _lacks_memory(error: Exception) -> bool:
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(words in said for words in _REFUSED)


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether `--json` was asked for, when the arguments could not be parsed."""
    before = list(arguments)[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in before


def _silence_stdout() -> None:
    """Keep the interpreter from complaining about a stdout that nobody reads."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
