"""Every way in which lora-cli says no, one class a cause, each with its own exit code.

    LoraCliError
    ├── UsageError                2  the command line or the arguments make no sense
    ├── MalformedFileError       10  a file is not what its format says
    ├── UnsafeInputError         11  a file tries to reach outside itself, or hides something
    ├── UnsupportedError         12  understood, and refused by name
    ├── NamesError               20  adapter and base names do not match
    ├── ShapeError               21  shapes do not match
    ├── NumericError             22  NaN, infinity or overflow
    ├── WrongInputError          23  not the base, adapter or undo file that belongs here
    ├── OutputExistsError        30  the output exists or is an input
    ├── DiskFullError            31  no space for the output
    ├── WriteError               32  the output could not be written
    ├── LockedError              33  somebody else writes there
    ├── HubError                 40  the Hub has it not, or does not give it
    └── Interrupted      129/130/143  a signal asked to stop

Exit code 1 is no error: it says that a comparison found differences. Callers treat any other code as failure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

DETAILS_SHOWN = 8
"""Details in the text of an error; `details` has all of them."""

SAVE_AGAIN = "save or download the adapter again, tensors and config together"
"""A hint where tensors of an adapter fit neither each other nor its config, whatever the base."""


class LoraCliError(Exception):
    """A refusal that a person can act on.

    Args:
        message: What happened, in one sentence without a final period.
        file: The file concerned, as the user would name it.
        tensor: The tensor or config field concerned.
        expected: What would have been right.
        found: What is there instead.
        hint: One action that mends it; the class's own advice unless given.
        details: Every mismatch of a batch, one a line, never only the first.
    """

    code: ClassVar[str] = "internal"
    exit_code: int = 70
    advice: ClassVar[str] = "run again with --debug and report what it prints"

    def __init__(
        self,
        message: str,
        *,
        file: object = None,
        tensor: str | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
        details: Iterable[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.hint = hint or self.advice
        self.details = tuple(details)

    def __str__(self) -> str:
        where = ": ".join(part or '""' for part in (self.file, self.tensor) if part is not None)
        facts = [f"{name} {value}" for name, value in (("found", self.found), ("expected", self.expected)) if value]
        said = f"{self.message} ({where})" if where else self.message
        more = len(self.details) - DETAILS_SHOWN
        listed = [", ".join([*self.details[:DETAILS_SHOWN], *([f"and {more} more"] if more > 0 else [])])]
        return "; ".join([said, *facts, *filter(None, listed), *([f"try: {self.hint}"] if self.hint else [])])


class UsageError(LoraCliError):
    """The command line or the arguments make no sense, or a path is not there."""

    code = "usage"
    exit_code = 2
    advice = "see --help of the command"


class MissingScaleError(UsageError):
    """Nothing says how strong an adapter is."""


class MalformedFileError(LoraCliError):
    """A file is not what its format says it is."""

    code = "malformed-file"
    exit_code = 10
    advice = "download or export the file again"


class ChangedFileError(MalformedFileError):
    """A file changed, ended or went away between two looks at it."""

    advice = "wait until nothing writes to it, then run again"


class UnsafeInputError(LoraCliError):
    """A file tries to reach outside itself, could be read in two ways, or could run code."""

    code = "unsafe-input"
    exit_code = 11
    advice = "get the file from a source that you trust"


class UnsupportedError(LoraCliError):
    """Something that lora-cli recognises and does not do."""

    code = "unsupported"
    exit_code = 12
    advice = "lora-cli inspect shows what the files hold; the README lists what is supported"


class NamesError(LoraCliError):
    """Adapter names and base names do not match, or match in two ways."""

    code = "names"
    exit_code = 20
    advice = "lora-cli inspect ADAPTER --base BASE shows which names resolve"


class ShapeError(LoraCliError):
    """Shapes do not match."""

    code = "shape"
    exit_code = 21
    advice = "check that this is the base that the adapter was trained on"


class NumericError(LoraCliError):
    """NaN, infinity, overflow, or numbers too small for the exact product."""

    code = "numeric"
    exit_code = 22
    advice = "check where these numbers come from: the training run, or the export"


class WrongInputError(LoraCliError):
    """Not the base, adapter or undo file that belongs here."""

    code = "wrong-input"
    exit_code = 23
    advice = "check that these files belong together"


class OutputExistsError(LoraCliError):
    """The output exists, or is one of the inputs."""

    code = "output-exists"
    exit_code = 30
    advice = "choose another place with -o"


class DiskFullError(LoraCliError):
    """No space for the output."""

    code = "disk-full"
    exit_code = 31
    advice = "free some space or choose another disk with -o"


class WriteError(LoraCliError):
    """The output could not be written."""

    code = "write"
    exit_code = 32
    advice = "check the rights and the disk of the output's folder"


class LockedError(LoraCliError):
    """Somebody else writes to the same output."""

    code = "locked"
    exit_code = 33
    advice = "wait for the other run to end"


class HubError(LoraCliError):
    """The Hub does not have it, does not give it, or cannot be reached."""

    code = "hub"
    exit_code = 40
    advice = "check the name and the network"


class Interrupted(LoraCliError):  # noqa: N818 (it is no error, it is an order)
    """A signal asked the program to stop; the output is absent, or was complete already."""

    code = "interrupted"
    advice = "run the same command again"

    def __init__(self, signal_number: int, written: str | None = None) -> None:
        super().__init__(
            f"Interrupted; {written} was complete by then" if written else "Interrupted; nothing was written"
        )
        self.exit_code = 128 + signal_number
        self._made_from = signal_number, written

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int, str | None], dict[str, object]]:
        return type(self), self._made_from, self.__dict__
