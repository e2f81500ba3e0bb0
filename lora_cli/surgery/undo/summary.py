"""What an undo file beside a checkpoint says of itself, for those who ask what they have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_cli.checkpoint.undo_file import UNDO_FILE, open_undo_file
from lora_cli.errors import LoraCliError
from lora_cli.surgery.receipt import beside


@dataclass(frozen=True)
class UndoSummary:
    """Whether and how a merge can be undone.

    Attributes:
        path: Name of the undo file.
        bytes: Its length.
        base: Label of the base that comes back.
        needs: Labels of the adapters that unmerging needs; the others are in the undo file.
        problem: Why it cannot be used; None where nothing is wrong that its header and manifest can tell.
    """

    path: str
    bytes: int
    base: str | None = None
    needs: tuple[str, ...] = ()
    problem: str | None = None


def undo_summary(checkpoint: Path) -> UndoSummary | None:
    """Look at the undo file of a checkpoint, if there is one."""
    place = beside(checkpoint, UNDO_FILE)
    if not place.is_file():
        return None
    size = place.stat().st_size
    try:
        manifest = open_undo_file(place).manifest
    except LoraCliError as error:
        return UndoSummary(place.name, size, problem=error.message)
    needs = tuple(said.label for said in manifest.adapters if said.held == "apart" and said.factors)
    return UndoSummary(place.name, size, manifest.base, needs)
