"""How long work tells what it does, without knowing who listens."""

from __future__ import annotations


class Progress:
    """Receives the steps of an operation; this one is silent.

    Operations call these methods from the thread that started them, in order: any number of `note` and `warn`,
    then `begin`, `advance` and `file_done` as work goes on, and `published` at the end. Override what you want to show.
    """

    def note(self, text: str) -> None:
        """Say something that a person may want to know (which rewrite was chosen, what was left out)."""

    def warn(self, text: str) -> None:
        """Say something that a person should look at, though the work goes on."""

    def begin(self, label: str, total_bytes: int) -> None:
        """Start a stretch of work of `total_bytes`."""

    def advance(self, done_bytes: int) -> None:
        """Say that `done_bytes` more are done."""

    def file_done(self, name: str, file_bytes: int) -> None:
        """Say that one file is complete."""

    def published(self, out: str) -> None:
        """Say that the output is complete and in its place."""


SILENT = Progress()
