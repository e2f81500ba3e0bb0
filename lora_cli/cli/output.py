"""The one place that writes to the terminal: results to stdout, everything else to stderr."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lora_cli.cli.document import rendered, unfolded
from lora_cli.cli.text import EMPTY, duration, shown, size
from lora_cli.errors import LoraCliError
from lora_cli.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress as Bar

BAR_AFTER_SECONDS = 1.0
REDRAW_SECONDS = 0.1
DETAILS_SHOWN = 8
"""Mismatches that an error lists for people; JSON has all of them."""


class ClosedPipe(Exception):  # noqa: N818 (the reader went away, which is no error)
    """Whoever read our output has stopped reading."""


@dataclasses.dataclass(slots=True)
class Output:
    """How results, warnings and errors are shown.

    Attributes:
        json: One JSON document on stdout, nothing else.
        quiet: Errors only.
        verbose: A line per file instead of a bar.
        debug: Tracebacks with errors.
        written: The output, once it is in its place.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    written: str | None = None

    def result(self, value: object, command: str, view: Callable[[], Iterable[RenderableType]]) -> None:
        """Show a result: as JSON under the schema of its command, or as the view draws it."""
        if self.json:
            self._print_json({"schema": f"lora-cli/{command}/1", **unfolded(value)})
        elif not self.quiet:
            console = self._console(sys.stdout)
            with _pipe():
                for part in view():
                    console.print(part)

    def error(self, error: LoraCliError) -> None:
        """Show an error: what, where, why, and what to do next."""
        if self.debug:
            for row in "".join(traceback.format_exception(error)).split("\n"):
                self._line("", shown(row, 1000))
        if self.json:
            self._print_json({"schema": "lora-cli/error/1", **error_fields(error)})
            return
        from rich.text import Text

        console = self._console(sys.stderr)
        console.print(Text.assemble(("error: ", "bold red"), _sentence(error)), soft_wrap=True)
        facts = [f"{name} {shown(value)}" for name, value in _facts(error) if value is not None]
        if facts:
            console.print(Text("  " + " · ".join(facts)), soft_wrap=True)
        for detail in error.details[:DETAILS_SHOWN]:
            console.print(Text(f"  - {shown(detail)}"), soft_wrap=True)
        if len(error.details) > DETAILS_SHOWN:
            console.print(Text(f"  … and {len(error.details) - DETAILS_SHOWN} more (--json lists all)"))
        if error.hint:
            console.print(Text.assemble(("  try: ", "bold"), shown(error.hint, 1000)), soft_wrap=True)

    def note(self, text: str) -> None:
        """Say something on stderr that a person may want to know."""
        if not (self.quiet or self.json):
            self._line("", shown(text, 1000))

    def warn(self, text: str) -> None:
        """Say something on stderr that a person should look at."""
        if not self.quiet:
            self._line("warning: ", shown(text, 1000))

    def show(self, parts: Iterable[RenderableType]) -> None:
        """Draw something on stderr, such as a plan."""
        if not (self.quiet or self.json):
            console = self._console(sys.stderr)
            for part in parts:
                console.print(part)

    def progress(self) -> Progress:
        """Something that shows the progress of long work in the way that was asked for."""
        bar = not (self.quiet or self.json or self.verbose) and sys.stderr.isatty()
        wanted = bar and os.environ.get("TERM") != "dumb" and not os.environ.get("LORA_CLI_NO_PROGRESS")
        return _ShownProgress(self, self._console(sys.stderr) if wanted else None)

    def _line(self, label: str, text: str) -> None:
        from rich.text import Text

        self._console(sys.stderr).print(Text.assemble((label, "yellow"), text), soft_wrap=True)

    def _console(self, stream: Any) -> Console:
        from rich.console import Console

        class OurConsole(Console):
            def on_broken_pipe(self) -> None:
                raise ClosedPipe  # rich would end the program with exit code 1, which means differences

        # highlight would colour numbers; markup would let a tensor's name draw.
        console = OurConsole(file=stream, highlight=False, markup=False, emoji=False)
        if console.width < 1:
            console.width = 80  # a terminal that does not know its width
        return console

    def _print_json(self, document: Mapping[str, Any]) -> None:
        with _pipe():
            print(rendered(document))  # noqa: T201


class _pipe:  # noqa: N801 (used as a context like a function)
    """Turns a closed reader into `ClosedPipe`, and flushes so that it is noticed here."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, BrokenPipeError):
            raise ClosedPipe from error
        if error is None:
            try:
                sys.stdout.flush()
            except BrokenPipeError as broken:
                raise ClosedPipe from broken


class _ShownProgress(Progress):
    """A bar on a terminal once the work takes longer than a moment, or a line per file."""

    def __init__(self, output: Output, console: Console | None) -> None:
        self._output = output
        self._console = console
        self._bar: Bar | None = None
        self._task: Any = None
        self._label, self._total, self._done, self._start = "", 0, 0, 0.0
        self._drawn = 0.0

    def note(self, text: str) -> None:
        self._output.note(text)

    def warn(self, text: str) -> None:
        self._output.warn(text)

    def published(self, out: str) -> None:
        self._output.written = out

    def begin(self, label: str, total_bytes: int) -> None:
        self.end()
        self._label, self._total, self._done, self._start = shown(label), total_bytes, 0, time.monotonic()

    def advance(self, done_bytes: int) -> None:
        self._done += done_bytes
        if self._console is None:
            return
        if self._bar is None and time.monotonic() - self._start > BAR_AFTER_SECONDS:
            self._show_bar(self._console)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, refresh=self._due())
        if self._done >= self._total:
            self.end()

    def _due(self) -> bool:
        """Whether it is time to redraw the bar."""
        now = time.monotonic()
        if now - self._drawn < REDRAW_SECONDS:
            return False
        self._drawn = now
        return True

    def file_done(self, name: str, file_bytes: int) -> None:
        if self._output.verbose and not self._output.quiet:
            rate = self._done / max(time.monotonic() - self._start, 1e-3)
            done = f"{size(self._done)} of {size(self._total)}"
            line = (
                f"{name}: {size(file_bytes)} done ({done}, {size(rate)}/s, {duration(time.monotonic() - self._start)})"
            )
            self._output._line("", shown(line))

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show_bar(self, console: Console) -> None:
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        # Without a thread that redraws: a process with threads cannot be forked.
        self._bar = RichProgress(*columns, TimeRemainingColumn(), console=console, transient=True, auto_refresh=False)
        self._task = self._bar.add_task(self._label, total=self._total, completed=self._done)
        self._bar.start()


def error_fields(error: LoraCliError) -> dict[str, Any]:
    """The fields of an error as its JSON schema has them."""
    return {
        "code": error.code,
        "exit": error.exit_code,
        "message": error.message,
        "file": error.file,
        "tensor": error.tensor,
        "expected": error.expected,
        "found": error.found,
        "hint": error.hint,
        "details": list(error.details),
    }


def _sentence(error: LoraCliError) -> str:
    where = ": ".join(shown(part) or EMPTY for part in (error.file, error.tensor) if part is not None)
    message = shown(error.message, 1000)
    return f"{where}: {message}" if where else message


def _facts(error: LoraCliError) -> Iterable[tuple[str, str | None]]:
    return (("found", error.found), ("expected", error.expected))
